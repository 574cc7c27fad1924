//! A committed binding beside the headers of this machine, by the C compiler.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a binding is of.
pub(crate) struct Headers {
    /// The binding, from the package's folder.
    pub(crate) binding: &'static str,
    pub(crate) header: &'static str,
    /// The names of its constants begin with one of these.
    pub(crate) constants: &'static [&'static str],
    pub(crate) unions: &'static [&'static str],
    /// The package that has the header.
    pub(crate) package: &'static str,
    /// Where headers are looked for before the system's.
    pub(crate) folders: Vec<PathBuf>,
    /// More of C that the header has to agree with.
    pub(crate) more: String,
    /// As many assertions have to be found, so that none is overlooked.
    pub(crate) least: usize,
}

/// What stands between two marks in a line.
fn between<'a>(line: &'a str, start: &str, end: &str) -> Option<&'a str> {
    line.split_once(start)?
        .1
        .split_once(end)
        .map(|found| found.0)
}

/// The binding's layout assertions and constants, as C's. Names that bindgen made up are left out.
fn assertions(headers: &Headers, binding: &str) -> String {
    let mut program = format!(
        "#include <stddef.h>\n#include <{}>\n{}",
        headers.header, headers.more
    );
    // An assertion may be broken over two lines.
    let joined = binding
        .replace("]\n        [", "][")
        .replace("pub(super) const ", "pub const ");
    let mut count = 0;
    for line in joined.lines() {
        let value = line
            .rsplit_once(" - ")
            .and_then(|(_, end)| end.split_once("usize"));
        let c_name = |name: &str| match name.strip_suffix("_t") {
            Some(_) => name.to_owned(),
            None if headers.unions.contains(&name) => format!("union {name}"),
            None => format!("struct {name}"),
        };
        let assertion =
            if let (Some(name), Some((value, _))) = (between(line, "Size of ", "\""), value) {
                (!name.contains("bindgen")).then(|| format!("sizeof({}) == {value}", c_name(name)))
            } else if let (Some(field), Some((value, _))) =
                (between(line, "Offset of field: ", "\""), value)
            {
                let (name, field) = field.split_once("::").unwrap();
                // What is a word of Rust's has a tail there.
                let field = field.trim_end_matches('_');
                (!name.contains("bindgen"))
                    .then(|| format!("offsetof({}, {field}) == {value}", c_name(name)))
            } else if let Some(name) = between(line, "pub const ", ":")
                && headers
                    .constants
                    .iter()
                    .any(|start| name.starts_with(start))
            {
                let value = between(line, " = ", ";").unwrap();
                Some(format!("(long)({name}) == {value}"))
            } else {
                None
            };
        if let Some(assertion) = assertion {
            count += 1;
            writeln!(program, "_Static_assert({assertion}, \"{count}\");").unwrap();
        }
    }
    assert!(
        count >= headers.least,
        "{count} assertions were found in {}",
        headers.binding
    );
    program
}

fn compiles(headers: &Headers, program: &str) -> Result<(), String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("layout.c");
    fs::write(&file, program).unwrap();
    let folders = headers.folders.iter();
    let output = Command::new("cc")
        .args(folders.flat_map(|folder| [Path::new("-I"), folder.as_path()]))
        .arg("-fsyntax-only")
        .arg(&file)
        .output()
        .unwrap();
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).into_owned())
}

impl Headers {
    /// Every size, offset and constant of the binding is the headers'; with `wrong` in place of `right` one is not, and that is
    /// noticed.
    pub(crate) fn agree(&self, right: &str, wrong: &str) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(self.binding);
        let binding = fs::read_to_string(path).unwrap();
        compiles(self, &assertions(self, &binding))
            .unwrap_or_else(|error| panic!("{} is missing, or differs: {error}", self.package));
        let other = binding.replace(right, wrong);
        assert_ne!(other, binding);
        assert!(compiles(self, &assertions(self, &other)).is_err());
    }

    /// Whether the header says otherwise.
    #[allow(dead_code, reason = "not every binding's test asks")]
    pub(crate) fn differs(&self) -> bool {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(self.binding);
        let binding = fs::read_to_string(path).unwrap();
        compiles(self, &assertions(self, &binding)).is_err()
    }
}
