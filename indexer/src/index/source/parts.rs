//! Blocks smaller than the index's in images: each part as the engine told it, from which follows what the index holds.

use super::super::config::Applied;
use super::super::fine::Part;
use super::super::image::ImagePart;
use super::super::tree::Shared;
use super::{Source, Writer};

impl Source {
    /// Every part, after the one that it follows, with its root.
    pub(in crate::index) fn parts(&self, mut take: impl FnMut(ImagePart, u32)) {
        let Some(fine) = &self.fine else {
            return;
        };
        let mut open = fine.starts();
        while let Some(hash) = open.pop() {
            let Some(part) = fine.get(hash) else {
                continue;
            };
            open.extend_from_slice(&part.children);
            let image = ImagePart {
                hash,
                parent: part.parent,
                namespace: 0,
                copies: part.copies,
                tokens: part.tokens.to_vec(),
                identifiers: part.identifiers.clone(),
                key: part.key,
            };
            take(image, part.root);
        }
    }

    /// Takes up a part of an image; one that does not fit where it says it is, or that is known, is refused.
    pub(in crate::index) fn take_up_part(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        part: &ImagePart,
        root: u32,
        applied: &mut Applied,
    ) {
        let Some(mut fine) = self.fine.take() else {
            applied.refused += 1;
            return;
        };
        let before = part.parent.map(|parent| fine.get(parent));
        let place = match before {
            None => Some(0),
            Some(Some(before)) if before.root == root => Some((before.place + 1) % fine.parts()),
            Some(_) => None,
        };
        let own = writer.keys.block_size.get() / fine.parts();
        let fitting = place.filter(|place| {
            let is_last = place + 1 == fine.parts();
            let wanted = if is_last { 0 } else { own as usize };
            part.key.is_some() == is_last
                && part.tokens.len() == wanted
                && fine.get(part.hash).is_none()
        });
        match fitting {
            Some(place) => {
                writer.roots.add(root);
                fine.insert(
                    part.hash,
                    Part {
                        parent: part.parent,
                        root,
                        place,
                        copies: part.copies,
                        tokens: part.tokens.as_slice().into(),
                        identifiers: part.identifiers.clone(),
                        key: part.key,
                        children: Vec::new(),
                    },
                );
                let ends = fine.ends_with(part.hash);
                self.refresh(writer, shared, ends, &fine, applied);
            }
            None => applied.refused += 1,
        }
        self.fine = Some(fine);
    }
}
