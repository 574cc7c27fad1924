//! Tests that look at the whole workspace: its layers, its habits, and its programs as a user runs them.

mod layers;
mod tidy;
