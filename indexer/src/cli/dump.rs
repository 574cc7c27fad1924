//! `kv-indexer dump`: what an index knows, for people and for another index.

use std::path::PathBuf;

use clap::Args;
use kvcache_core::{Error, ErrorKind, Result, Tier};
use kvfabric_proto::v1;
use serde_json::json;

use super::ask::Target;
use super::print_line;
use crate::index::ImagePiece;
use crate::score::TIERS;
use crate::snapshot::{self, Mark, Reader, Step};
use crate::wire::source_name;

/// Write down what a running index knows: sources and blocks, or a file that another index can begin from.
#[derive(Clone, Debug, Args)]
pub struct Dump {
    #[command(flatten)]
    target: Target,
    /// Print every block too, not only the sources.
    #[arg(long, conflicts_with = "file")]
    blocks: bool,
    /// Write a snapshot file, which `snapshot_path` of another index may name, and print nothing.
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    file: Option<PathBuf>,
}

impl Dump {
    pub(super) async fn run(self) -> Result<()> {
        let mut stream = self.target.client()?.snapshot().await?;
        let mut next = async || -> Result<v1::SnapshotPiece> {
            let piece = stream.message().await;
            let piece = piece.map_err(|status| crate::wire::error_from_status(&status))?;
            piece.ok_or_else(|| Error::new(ErrorKind::PeerLost, "the index ended the snapshot"))
        };
        let mut reader = Reader::default();
        let mut printer = Printer::new(self.target.json, self.blocks);
        let mut pieces = Vec::new();
        while !reader.is_complete() {
            let piece = next().await?;
            if self.file.is_some() {
                pieces.push(piece.clone());
            }
            let step = reader.read(piece)?;
            if self.file.is_none() {
                printer.print(step)?;
            }
        }
        match self.file {
            Some(path) => {
                // Only a snapshot that came to its end gets this far.
                snapshot::write(&path, |out| pieces.into_iter().try_for_each(out)).map(drop)
            }
            None => Ok(()),
        }
    }
}

/// Prints a source when the next one begins, since its blocks come in pieces.
struct Printer {
    is_json: bool,
    has_blocks: bool,
    pod: Option<kvcache_core::PodName>,
    source: Option<Told>,
    /// A model and how many blocks of it shared tiers hold.
    shared: Option<(String, usize)>,
}

struct Told {
    name: String,
    mark: Option<Mark>,
    blocks: [u64; TIERS],
    orphans: u64,
}

impl Printer {
    fn new(is_json: bool, has_blocks: bool) -> Self {
        Self {
            is_json,
            has_blocks,
            pod: None,
            source: None,
            shared: None,
        }
    }

    fn print(&mut self, step: Step) -> Result<()> {
        match step {
            Step::Start { .. } => Ok(()),
            Step::Pod { registration, .. } => {
                self.print_source()?;
                self.pod = Some(registration.pod);
                Ok(())
            }
            Step::Source { name, mark, .. } => {
                self.print_source()?;
                self.source = Some(Told {
                    name: self
                        .pod
                        .as_ref()
                        .map_or_else(String::new, |pod| source_name(pod, &name)),
                    mark,
                    blocks: [0; TIERS],
                    orphans: 0,
                });
                Ok(())
            }
            Step::Image(image) => self.print_image(&image),
            Step::Shared { tenant, mut model } => {
                self.print_source()?;
                if !tenant.is_empty() {
                    model.push_str(&format!(" of tenant {tenant}"));
                }
                self.shared = Some((model, 0));
                Ok(())
            }
            Step::SharedImage(entries) => {
                if let Some((_, blocks)) = &mut self.shared {
                    *blocks += entries.len();
                }
                Ok(())
            }
            Step::End => self.print_source(),
        }
    }

    fn print_image(&mut self, image: &ImagePiece) -> Result<()> {
        let Some(source) = &mut self.source else {
            return Ok(());
        };
        source.orphans += image.orphans.len() as u64;
        for block in &image.blocks {
            let held = Tier::ALL.into_iter().zip(block.copies);
            let held = held.filter(|(_, copies)| *copies > 0);
            held.clone()
                .for_each(|(tier, _)| source.blocks[tier as usize] += 1);
            if !self.has_blocks {
                continue;
            }
            let line = if self.is_json {
                let copies = held.map(|(tier, copies)| (tier.name().to_owned(), json!(copies)));
                json!({
                    "block": format!("{:016x}", block.key.0),
                    "source": source.name,
                    "name": format!("{:016x}", block.hash.0),
                    "copies": copies.collect::<serde_json::Map<_, _>>(),
                })
                .to_string()
            } else {
                let copies: Vec<_> = held
                    .map(|(tier, copies)| format!("{tier} {copies}"))
                    .collect();
                format!(
                    "  block {:016x} as {:016x}: {}",
                    block.key.0,
                    block.hash.0,
                    copies.join(", ")
                )
            };
            print_line(&line)?;
        }
        Ok(())
    }

    /// Prints what came before: a source, or what shared tiers hold of a model.
    fn print_source(&mut self) -> Result<()> {
        if let Some((model, blocks)) = self.shared.take() {
            let line = if self.is_json {
                json!({ "model": model, "shared_blocks": blocks }).to_string()
            } else {
                format!("shared tiers hold {blocks} blocks of model {model:?}")
            };
            return print_line(&line);
        }
        let Some(source) = self.source.take() else {
            return Ok(());
        };
        let tiers = Tier::ALL.into_iter().zip(source.blocks);
        let position = source.mark.map(|mark| mark.position);
        if self.is_json {
            let blocks = tiers.map(|(tier, blocks)| (tier.name().to_owned(), json!(blocks)));
            let line = json!({
                "source": source.name,
                "epoch": position.map(|at| at.epoch.0),
                "next_sequence": position.map(|at| at.next.0),
                "blocks": blocks.collect::<serde_json::Map<_, _>>(),
                "orphans": source.orphans,
            });
            return print_line(&line.to_string());
        }
        let blocks: Vec<_> = tiers
            .filter(|(_, blocks)| *blocks > 0)
            .map(|(tier, blocks)| format!("{tier} {blocks}"))
            .collect();
        let position = match position {
            Some(at) => format!("epoch {}, sequence {}", at.epoch, at.next),
            None => "cannot be continued elsewhere".to_owned(),
        };
        print_line(&format!(
            "{:<24} {position}; blocks: {}; orphans {}",
            source.name,
            blocks.join(", "),
            source.orphans
        ))
    }
}
