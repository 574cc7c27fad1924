//! The little of canonical CBOR (RFC 8949, section 4.2.1) that hashed keys are made of.

/// Takes encoded bytes: a buffer, or a hash fed directly.
pub(super) trait Sink {
    /// Appends.
    fn write(&mut self, bytes: &[u8]);
}

impl Sink for Vec<u8> {
    fn write(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

/// A major type with its argument, in the shortest form.
fn head(sink: &mut impl Sink, major: u8, argument: u64) {
    let major = major << 5;
    let wide = argument.to_be_bytes();
    match argument {
        0..=23 => sink.write(&[major | wide[7]]),
        24..=0xff => sink.write(&[major | 24, wide[7]]),
        0x100..=0xffff => sink.write(&[major | 25, wide[6], wide[7]]),
        0x1_0000..=0xffff_ffff => {
            sink.write(&[major | 26, wide[4], wide[5], wide[6], wide[7]]);
        }
        _ => {
            sink.write(&[major | 27]);
            sink.write(&wide);
        }
    }
}

pub(super) fn unsigned(sink: &mut impl Sink, value: u64) {
    head(sink, 0, value);
}

pub(super) fn signed(sink: &mut impl Sink, value: i64) {
    if value < 0 {
        // CBOR writes a negative n as -1 - n, which is the bitwise complement.
        head(sink, 1, !value as u64);
    } else {
        head(sink, 0, value as u64);
    }
}

pub(super) fn bytes(sink: &mut impl Sink, value: &[u8]) {
    head(sink, 2, value.len() as u64);
    sink.write(value);
}

pub(super) fn text(sink: &mut impl Sink, value: &str) {
    head(sink, 3, value.len() as u64);
    sink.write(value.as_bytes());
}

pub(super) fn array(sink: &mut impl Sink, len: usize) {
    head(sink, 4, len as u64);
}

pub(super) fn map(sink: &mut impl Sink, len: usize) {
    head(sink, 5, len as u64);
}

pub(super) fn null(sink: &mut impl Sink) {
    sink.write(&[0xf6]);
}
