//! Every order of a writer and a reader, by loom's search; the scenarios say what may be seen.
#![cfg(test)]

use kvfabric_index_orders::scenarios;

/// A header's version around a change of two words.
#[test]
fn a_run_changes_whole_or_not_at_all() {
    scenarios::a_run_changes_whole_or_not_at_all();
}

/// Publication: the run, then its entry.
#[test]
fn an_entry_leads_to_what_was_written_before() {
    scenarios::an_entry_leads_to_what_was_written_before();
}

/// The entries' version around one that goes.
#[test]
fn entries_change_whole_or_not_at_all() {
    scenarios::entries_change_whole_or_not_at_all();
}

/// Reclamation: a list given out again under a reader.
#[test]
fn a_list_that_is_used_again_is_not_believed() {
    scenarios::a_list_that_is_used_again_is_not_believed();
}

/// The version of what lookups are shown of a source.
#[test]
fn what_is_shown_is_of_one_moment() {
    scenarios::what_is_shown_is_of_one_moment();
}
