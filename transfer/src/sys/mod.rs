//! The operating system, behind safe functions: the only place of this crate, with the backends, that has `unsafe`.

pub(crate) mod cuda;
pub(crate) mod cufile;
pub(crate) mod fork;
pub(crate) mod host;
pub(crate) mod memory;
pub(crate) mod process;
pub(crate) mod process_vm;
pub(crate) mod socket;
pub(crate) mod ucx;
pub(crate) mod verbs;
