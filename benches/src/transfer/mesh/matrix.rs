//! Who moves how much to whom: a pattern, or a file with a row for each source and a column for each sink.

use std::path::Path;

use kvcache_core::{Error, ErrorKind, Result};

use crate::sizes::parse_bytes;

use super::Pattern;

/// Blocks from one peer to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Edge {
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) bytes: u64,
    /// Where the number stands, for errors.
    pub(super) place: String,
}

/// All that is moved in an iteration.
///
/// # Errors
/// `Invalid` naming the file, the row and the column; `Io` when it cannot be read.
pub(super) fn edges(
    pattern: Pattern,
    matrix: Option<&Path>,
    peers: usize,
    bytes: u64,
) -> Result<Vec<Edge>> {
    let edges = match matrix {
        Some(path) => {
            let place = format!("--matrix {}", path.display());
            let text =
                std::fs::read_to_string(path).map_err(|error| Error::io(place.clone(), error))?;
            parse(&text, peers).map_err(|error| error.at(place))?
        }
        None => of_pattern(pattern, peers, bytes)?,
    };
    if edges.is_empty() {
        return Err(Error::new(ErrorKind::Invalid, "nobody moves anything"));
    }
    Ok(edges)
}

fn of_pattern(pattern: Pattern, peers: usize, bytes: u64) -> Result<Vec<Edge>> {
    if pattern == Pattern::Pairwise && !peers.is_multiple_of(2) {
        let context = format!("--pattern pairwise needs an even number of peers, not {peers}");
        return Err(Error::new(ErrorKind::Invalid, context));
    }
    let half = peers / 2;
    let pairs: Vec<(usize, usize)> = match pattern {
        Pattern::Pairwise => (0..half).map(|from| (from, from + half)).collect(),
        Pattern::ManyToOne => (0..peers - 1).map(|from| (from, peers - 1)).collect(),
        Pattern::OneToMany => (1..peers).map(|to| (0, to)).collect(),
        Pattern::AllToAll => (0..peers)
            .flat_map(|from| (0..peers).map(move |to| (from, to)))
            .filter(|(from, to)| from != to)
            .collect(),
    };
    let edge = |(from, to)| Edge {
        from,
        to,
        bytes,
        place: "--total-bytes".to_owned(),
    };
    Ok(pairs.into_iter().map(edge).collect())
}

fn parse(text: &str, peers: usize) -> Result<Vec<Edge>> {
    let wrong = |context: String| Error::new(ErrorKind::Invalid, context);
    let rows = text
        .lines()
        .map(|line| line.split('#').next().unwrap_or(""));
    let rows: Vec<&str> = rows.filter(|line| !line.trim().is_empty()).collect();
    if rows.len() != peers {
        return Err(wrong(format!("{} rows for {peers} peers", rows.len())));
    }
    let mut edges = Vec::new();
    for (from, row) in rows.iter().enumerate() {
        let cells: Vec<&str> = row.split_whitespace().collect();
        if cells.len() != peers {
            let context = format!(
                "row {}: {} columns for {peers} peers",
                from + 1,
                cells.len()
            );
            return Err(wrong(context));
        }
        for (to, cell) in cells.iter().enumerate() {
            if *cell == "0" {
                continue;
            }
            let place = format!("row {}, column {}", from + 1, to + 1);
            let bytes = parse_bytes(cell).map_err(|error| error.at(place.clone()))?;
            if from == to {
                return Err(wrong(format!("{place}: nobody moves bytes to itself")));
            }
            edges.push(Edge {
                from,
                to,
                bytes,
                place,
            });
        }
    }
    Ok(edges)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(pattern: Pattern, peers: usize) -> Vec<(usize, usize)> {
        let edges = edges(pattern, None, peers, 8).unwrap();
        edges.iter().map(|edge| (edge.from, edge.to)).collect()
    }

    /// Each pattern over three or four peers.
    #[test]
    fn patterns_say_who_moves_to_whom() {
        assert_eq!(pairs(Pattern::Pairwise, 4), [(0, 2), (1, 3)]);
        assert_eq!(pairs(Pattern::ManyToOne, 3), [(0, 2), (1, 2)]);
        assert_eq!(pairs(Pattern::OneToMany, 3), [(0, 1), (0, 2)]);
        let all = [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)];
        assert_eq!(pairs(Pattern::AllToAll, 3), all);
        let error = edges(Pattern::Pairwise, None, 3, 8).unwrap_err();
        assert!(error.to_string().contains("even"), "{error}");
    }

    /// A matrix with remarks, units and zeros.
    #[test]
    fn a_matrix_names_the_bytes_of_each_pair() {
        let edges = parse(
            "# two prefills, a decode\n0 0 1M\n0 0 4K # less\n\n0 0 0\n",
            3,
        )
        .unwrap();
        let short: Vec<_> = edges.iter().map(|e| (e.from, e.to, e.bytes)).collect();
        assert_eq!(short, [(0, 2, 1 << 20), (1, 2, 4096)]);
        assert_eq!(edges[1].place, "row 2, column 3");
    }

    /// Each way to write a matrix wrongly: the error says where.
    #[test]
    fn a_wrong_matrix_is_refused_by_place() {
        for (text, named) in [
            ("0 1\n", "1 rows for 2 peers"),
            ("0 1\n1\n", "row 2: 1 columns"),
            ("0 1\n1 0 0\n", "row 2: 3 columns"),
            ("0 x\n0 0\n", "row 1, column 2"),
            ("5 1\n0 0\n", "row 1, column 1"),
        ] {
            let error = parse(text, 2).unwrap_err();
            assert!(error.to_string().contains(named), "{text:?}: {error}");
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("zeros");
        std::fs::write(&path, "0 0\n0 0\n").unwrap();
        let error = edges(Pattern::Pairwise, Some(&path), 2, 8).unwrap_err();
        assert!(error.to_string().contains("nobody"), "{error}");
    }
}
