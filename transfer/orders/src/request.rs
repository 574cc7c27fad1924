//! A request and those who decide what becomes of it.

#[path = "../../src/request/check.rs"]
mod check;
#[path = "../../src/request/connecting.rs"]
mod connecting;
#[path = "../../src/request/core.rs"]
mod core;
#[path = "../../src/request/later.rs"]
mod later;
#[path = "../../src/request/piece.rs"]
mod piece;
#[path = "../../src/request/rate.rs"]
mod rate;
pub mod scenarios;
#[path = "../../src/request/slow.rs"]
mod slow;
#[path = "../../src/request/state.rs"]
mod state;
#[path = "../../src/request/ticket.rs"]
mod ticket;

pub(crate) use self::core::{RequestCore, TRIES_MAX};
pub(crate) use self::later::Later;
pub(crate) use self::rate::{Bucket, Priority};
pub(crate) use self::ticket::Ticket;
