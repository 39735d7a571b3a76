//! Every flow in every capture: it works, with proof of the way that it took, or it is refused for a reason that is told.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;

#[path = "flows/column.rs"]
mod column;
#[path = "flows/ground.rs"]
mod ground;
#[path = "flows/guest.rs"]
mod guest;
#[path = "flows/packets.rs"]
mod packets;
#[path = "flows/rows.rs"]
mod rows;
#[path = "flows/table.rs"]
mod table;
#[path = "flows/trial.rs"]
mod trial;

use std::path::Path;

use column::Column;
use lab::topology::Cni;
use table::Table;
use trial::try_all;

/// Where the table is written to, if anywhere: this and the same with the ending `json`.
const WRITE_TO: &str = "WRITE_FLOWS";

/// What every change is tried with: every capture with routed pods, and one on a bridge. The full suite tries the rest.
fn columns() -> Vec<Column> {
    let mut columns = Column::all();
    let all = std::env::var("AMBIDEX_TEST_SUITE").is_ok_and(|suite| suite == "all");
    if !all && std::env::var_os(WRITE_TO).is_none() {
        let mut bridged = false;
        columns.retain(|column| {
            let first = column.cni == Cni::Bridge && !column.is_node() && !column.v6 && !bridged;
            bridged |= first;
            (column.cni == Cni::Routed && !column.v6) || first
        });
    }
    // Refused before any flow could be tried.
    columns.retain(|column| !(column.is_node() && column.cni == Cni::Bridge));
    columns
}

#[test]
fn every_flow_in_every_capture() {
    let columns = columns();
    // Two at a time: each waits for its lab more than it computes.
    let mut tried = Vec::new();
    for pair in columns.chunks(2) {
        let results: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = pair
                .iter()
                .map(|column| scope.spawn(move || try_all(column)))
                .collect();
            threads.into_iter().map(|thread| thread.join()).collect()
        });
        for (column, result) in pair.iter().zip(results) {
            let cells =
                result.unwrap_or_else(|_| panic!("{:?} could not be tried", column.named()));
            tried.push((*column, cells));
        }
    }
    let wrong: Vec<String> = tried
        .iter()
        .flat_map(|(column, cells)| cells.iter().filter_map(|cell| cell.wrong(column)))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let counted: Vec<usize> = tried.iter().map(|(_, cells)| cells.len()).collect();
    assert!(
        counted.iter().all(|count| *count == rows::ROWS.len()),
        "{counted:?}"
    );
    if let Some(path) = std::env::var_os(WRITE_TO) {
        Table::of(&tried).write(Path::new(&path));
    }
}

/// The table that readers have is of these flows and these captures.
#[test]
fn the_documented_table_is_of_these_flows() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(root.join("docs/flows.md")).unwrap();
    let documented: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.split(" |").next())
        .filter(|first| *first != "flow")
        .collect();
    let flows: Vec<&str> = rows::ROWS.iter().map(|row| row.flow).collect();
    assert_eq!(documented, flows, "`make flows` writes it");
}
