//! What became of the flows, for readers: as Markdown and as JSON.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;

use lab::topology::Cni;
use serde::Serialize;

use super::column::{Captured, Column, Named};
use super::rows::{BRIDGE, ROWS};
use super::trial::Cell;

/// All captures, tried and refused.
#[derive(Debug, Serialize)]
pub struct Table {
    commit: String,
    columns: Vec<Tried>,
}

#[derive(Debug, Serialize)]
struct Tried {
    #[serde(flatten)]
    named: Named,
    flows: Vec<Cell>,
    /// Why nothing was tried.
    #[serde(skip_serializing_if = "Option::is_none")]
    refused: Option<&'static str>,
}

impl Table {
    /// What was tried, and what is refused before it could be.
    pub fn of(tried: &[(Column, Vec<Cell>)]) -> Self {
        let column = |column: &Column, flows: Vec<Cell>, refused| Tried {
            named: column.named(),
            flows,
            refused,
        };
        let mut columns: Vec<Tried> = tried
            .iter()
            .map(|(tried, cells)| column(tried, cells.clone(), None))
            .collect();
        for refused in Column::all() {
            if matches!(refused.captured, Captured::Node(_))
                && refused.cni == Cni::Bridge
                && !refused.v6
            {
                columns.push(column(&refused, Vec::new(), Some(BRIDGE)));
            }
        }
        let mut git = Command::new("git");
        git.args(["describe", "--always", "--dirty=+"]);
        let head = git.current_dir(env!("CARGO_MANIFEST_DIR")).output();
        let commit = String::from_utf8(head.unwrap().stdout).unwrap();
        Self {
            commit: commit.trim().to_owned(),
            columns,
        }
    }

    /// Writes both forms.
    pub fn write(&self, markdown: &Path) {
        fs::write(markdown, self.markdown()).unwrap();
        let json = serde_json::to_string_pretty(self).unwrap();
        fs::write(markdown.with_extension("json"), json + "\n").unwrap();
    }

    fn markdown(&self) -> String {
        let mut reasons: Vec<&str> = Vec::new();
        let mut text = format!(
            "# Flows\n\n\
             Written by `make flows` (commit {}): each cell was tried in a lab, and holds what was seen there.\n\n\
             * First the proxies' part, once per connection by their access logs: **mesh** (taken on its way out, tunnelled \
             with mutual TLS, both identities proven), **outbound** or **inbound** (taken there, handed on in the clear), \
             **direct** (no proxy), **works** (not asked).\n\
             * Then whom the server saw, where it can say so. Datagrams and pings keep their addresses.\n\
             * Then what a tap on the link between the nodes could read of it, if it passes there: **TLS** (nothing), \
             **clear** (all).\n\n\
             \"Pod\" is a captured one, pod1-1 unless the flow says more. Its own node is node1. \"300 kB over a smaller link\" \
             is each way, with 1400 bytes between the nodes and 1500 elsewhere.\n\n",
            self.commit
        );
        let tried: Vec<&Tried> = self
            .columns
            .iter()
            .filter(|c| c.refused.is_none())
            .collect();
        text.push_str("| flow |");
        for column in &tried {
            let Named {
                capture,
                cni,
                family,
            } = &column.named;
            let _ = write!(text, " {capture}, {cni}, {family} |");
        }
        let _ = writeln!(text, "\n|---|{}", "---|".repeat(tried.len()));
        for (at, row) in ROWS.iter().enumerate() {
            let _ = write!(text, "| {} |", row.flow);
            for column in &tried {
                let _ = write!(text, " {} |", words(&column.flows[at], &mut reasons));
            }
            text.push('\n');
        }
        text.push('\n');
        for column in self.columns.iter().filter(|c| c.refused.is_some()) {
            let Named { capture, cni, .. } = &column.named;
            let _ = writeln!(
                text,
                "* **{capture}, {cni}**: {}.",
                column.refused.unwrap_or_default()
            );
        }
        text.push('\n');
        for (number, reason) in reasons.iter().enumerate() {
            let _ = writeln!(text, "{}. {reason}.", number + 1);
        }
        text
    }
}

fn words(cell: &Cell, reasons: &mut Vec<&'static str>) -> String {
    if let Some(reason) = cell.refused {
        let known = reasons.iter().position(|known| *known == reason);
        let number = known.unwrap_or_else(|| {
            reasons.push(reason);
            reasons.len() - 1
        });
        return format!("refused ({})", number + 1);
    }
    let mut words = vec![cell.path.clone().unwrap_or_else(|| "works".to_owned())];
    words.extend(cell.seen.clone());
    words.extend(cell.wire.clone());
    words.join("; ")
}
