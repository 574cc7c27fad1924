//! Tests of the order of batches.
