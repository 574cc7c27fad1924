//! Maps from block keys, and what the manager knows of each block.

use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::BuildHasherDefault;

/// A hash map whose hasher has no random seed, so that equal histories give equal maps.
///
/// Its iteration order is still arbitrary: nothing that shows outside may depend on it.
pub type KeyMap<K, V> = HashMap<K, V, BuildHasherDefault<DefaultHasher>>;
