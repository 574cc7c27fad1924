//! What the driver's calls answer and fill in.

use std::ffi::{c_char, c_int};

use super::calls::{Answer, Code};

/// The longest name that is asked for, with its end.
const NAME_BYTES: usize = 256;

pub(super) fn answer(code: u32) -> Answer<()> {
    match code {
        0 => Ok(()),
        code => Err(Code(code)),
    }
}

/// What a call fills in.
pub(super) fn filled<T>(empty: T, call: impl FnOnce(*mut T) -> u32) -> Answer<T> {
    let mut value = empty;
    answer(call(&raw mut value))?;
    Ok(value)
}

/// The text that a call fills in.
pub(super) fn filled_text(call: impl FnOnce(*mut c_char, c_int) -> u32) -> Answer<String> {
    let mut bytes = [0_u8; NAME_BYTES];
    // One byte less than there is room, so that it ends whatever is written.
    answer(call(bytes.as_mut_ptr().cast(), NAME_BYTES as c_int - 1))?;
    let end = bytes
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(NAME_BYTES);
    Ok(String::from_utf8_lossy(&bytes[..end]).into_owned())
}
