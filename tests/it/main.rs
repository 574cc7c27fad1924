//! Tests that look at the whole workspace: its layers and its habits.
#![cfg(test)]

mod layers;
mod tidy;
