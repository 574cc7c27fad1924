//! Turns token chains into block keys: our own, and those of the engines and routers around us.
//!
//! Two families, never mixed. *Index keys* ([`IndexScheme`], [`IndexChain`]) are fast 64-bit hashes that place a
//! block in the global index; a collision there costs a wrong route. *Data keys* ([`data`]) are 256-bit and
//! cryptographic; stored bytes are found by nothing else.
//!
//! | module | what it reproduces |
//! |---|---|
//! | [`xxh3`] | the index chain of Dynamo's router and Mooncake's conductor |
//! | [`llmd`] | llm-d's request keys, CBOR with FNV-1a and XXH64 |
//! | [`vllm`] | vLLM's block hashes, all four algorithms |
//! | [`sglang`] | SGLang's page hashes |
//! | [`data`] | our own data keys |
//!
//! A partial last block never has a key.

mod cbor;
mod chain;
pub mod data;
mod describe;
pub mod llmd;
mod pickle;
pub mod sglang;
pub mod vllm;
pub mod xxh3;

pub use chain::{ChainRoot, IndexChain, IndexScheme, Namespace};
pub use describe::describe;

#[cfg(test)]
mod tests;
