//! The committed binding of UCX beside the headers of this machine: every size, offset and constant, by the C compiler.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

const BINDING: &str = "src/sys/ucx/generated/ucp.rs";

/// What stands between two marks in a line.
fn between<'a>(line: &'a str, start: &str, end: &str) -> Option<&'a str> {
    line.split_once(start)?
        .1
        .split_once(end)
        .map(|found| found.0)
}

/// The binding's layout assertions and constants, as C's. Names that bindgen made up are left out.
fn assertions(binding: &str) -> String {
    let mut program = String::from("#include <stddef.h>\n#include <ucp/api/ucp.h>\n");
    // An assertion may be broken over two lines.
    let joined = binding.replace("]\n        [", "][");
    let mut count = 0;
    for line in joined.lines() {
        let value = line
            .rsplit_once(" - ")
            .and_then(|(_, end)| end.split_once("usize"));
        let c_name = |name: &str| match name.strip_suffix("_t") {
            Some(_) => name.to_owned(),
            None => format!("struct {name}"),
        };
        let assertion =
            if let (Some(name), Some((value, _))) = (between(line, "Size of ", "\""), value) {
                (!name.contains("bindgen")).then(|| format!("sizeof({}) == {value}", c_name(name)))
            } else if let (Some(field), Some((value, _))) =
                (between(line, "Offset of field: ", "\""), value)
            {
                let (name, field) = field.split_once("::").unwrap();
                (!name.contains("bindgen"))
                    .then(|| format!("offsetof({}, {field}) == {value}", c_name(name)))
            } else if let Some(name) = between(line, "pub const ", ":")
                && (name.starts_with("UCP_") || name.starts_with("UCS_"))
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
    assert!(count > 150, "{count} assertions were found in {BINDING}");
    program
}

fn compiles(program: &str) -> Result<(), String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("layout.c");
    fs::write(&file, program).unwrap();
    let output = Command::new("cc")
        .arg("-fsyntax-only")
        .arg(&file)
        .output()
        .unwrap();
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn the_binding_is_what_the_headers_say() {
    let binding = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(BINDING)).unwrap();
    let program = assertions(&binding);
    compiles(&program).unwrap_or_else(|error| panic!("libucx-dev is missing, or differs: {error}"));
    // A binding that were off by one field would be noticed.
    let wrong = binding.replace(
        "offset_of!(ucp_params, features) - 8usize",
        "offset_of!(ucp_params, features) - 16usize",
    );
    assert_ne!(wrong, binding);
    assert!(compiles(&assertions(&wrong)).is_err());
}
