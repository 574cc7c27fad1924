//! One error type, its kinds chosen by what the caller can do about it.

use std::borrow::Cow;
use std::fmt;

/// The result of a fallible kvfabric call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a caller can do about an error; each has one number at the C edge, never reused.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum ErrorKind {
    /// An argument, a configuration value or a message is malformed; repeating it cannot help.
    Invalid = 1,
    /// A limit is reached; try again after completions.
    Busy = 2,
    /// Bytes do not match their checksum, length or version; drop this copy.
    Corrupt = 3,
    /// The peer is gone; other holders may do.
    PeerLost = 4,
    /// This backend or build cannot do it, here or ever.
    Unsupported = 5,
    /// The deadline passed first.
    Timeout = 6,
    /// The caller withdrew the request.
    Cancelled = 7,
    /// The other side speaks another version of the protocol or format; both are named.
    Version = 8,
    /// A disk, arena or store is full.
    NoSpace = 9,
    /// The other side does not allow it: a wrong key, a stranger, read-only memory.
    Denied = 10,
    /// An earlier panic left this object unusable.
    Poisoned = 11,
    /// What was named does not exist: a region, a segment, an object.
    NotFound = 12,
    /// The operating system or a store refused; the cause is the error's source.
    Io = 13,
    /// The call was made in a forked child, where the parent's threads and registrations do not exist.
    Forked = 14,
    /// A promise of ours was broken; please report it.
    Internal = 15,
}

impl ErrorKind {
    /// The number of this kind at the C edge and on the wire.
    #[must_use]
    pub const fn code(self) -> u32 {
        self as u32
    }

    /// The short lower-case name, as in logs and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Invalid => "invalid",
            Self::Busy => "busy",
            Self::Corrupt => "corrupt",
            Self::PeerLost => "peer_lost",
            Self::Unsupported => "unsupported",
            Self::Timeout => "timeout",
            Self::Cancelled => "cancelled",
            Self::Version => "version",
            Self::NoSpace => "no_space",
            Self::Denied => "denied",
            Self::Poisoned => "poisoned",
            Self::NotFound => "not_found",
            Self::Io => "io",
            Self::Forked => "forked",
            Self::Internal => "internal",
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What went wrong, with the value and the place where they are known, and the cause as `source`.
///
/// A cache miss is a value, never an error.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    context: Cow<'static, str>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind`; `context` names the value and the place, as a phrase without a full stop.
    #[must_use]
    pub fn new(kind: ErrorKind, context: impl Into<Cow<'static, str>>) -> Self {
        Self(Box::new(Inner {
            kind,
            context: context.into(),
            source: None,
        }))
    }

    /// A value outside its range: names the field, the value and what would have been accepted.
    #[must_use]
    pub fn invalid(field: &str, value: impl fmt::Display, accepted: impl fmt::Debug) -> Self {
        Self::new(
            ErrorKind::Invalid,
            format!("{field} is {value}, expected {accepted:?}"),
        )
    }

    /// An operating-system error; full disks become [`ErrorKind::NoSpace`], the rest [`ErrorKind::Io`].
    #[must_use]
    pub fn io(context: impl Into<Cow<'static, str>>, source: std::io::Error) -> Self {
        let kind = match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                ErrorKind::NoSpace
            }
            std::io::ErrorKind::NotFound => ErrorKind::NotFound,
            std::io::ErrorKind::PermissionDenied => ErrorKind::Denied,
            std::io::ErrorKind::TimedOut => ErrorKind::Timeout,
            _ => ErrorKind::Io,
        };
        Self::new(kind, context).with_source(source)
    }

    /// The same error with its cause attached.
    #[must_use]
    pub fn with_source(
        mut self,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// The same error seen from further out: `place` (a file, a peer, a field) goes in front.
    #[must_use]
    pub fn at(mut self, place: impl fmt::Display) -> Self {
        self.0.context = format!("{place}: {}", self.0.context).into();
        self
    }

    /// What the caller can do about it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The value and the place, without the causes.
    #[must_use]
    pub fn context(&self) -> &str {
        &self.0.context
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.context)?;
        if let Some(source) = &self.0.source {
            write!(f, ": {source}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}] {self}", self.0.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|source| {
            let source: &(dyn std::error::Error + 'static) = &**source;
            source
        })
    }
}
