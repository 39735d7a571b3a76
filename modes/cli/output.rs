//! Output formats, as kubectl has them.

use std::io::{self, Write};

use clap::{Args, ValueEnum};
use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

/// How a list is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Columns.
    Table,
    /// More columns.
    Wide,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
}

/// The flag `-o`.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct OutputArgs {
    /// Output format
    #[arg(short, long, value_enum, default_value = "table")]
    pub(crate) output: Format,
}

impl OutputArgs {
    /// Prints `value`: as it is in JSON or YAML, or by `table`, which is told whether it may be wide.
    pub(crate) fn print<T: Serialize>(
        self,
        value: &T,
        table: impl FnOnce(bool) -> Table,
    ) -> anyhow::Result<()> {
        print(&self.render(value, table)?)?;
        Ok(())
    }

    /// What [`OutputArgs::print`] prints.
    pub(crate) fn render<T: Serialize>(
        self,
        value: &T,
        table: impl FnOnce(bool) -> Table,
    ) -> anyhow::Result<String> {
        Ok(match self.output {
            Format::Json => format!("{}\n", serde_json::to_string_pretty(value)?),
            Format::Yaml => serde_saphyr::to_string(value)?,
            Format::Table => trimmed(&table(false)),
            Format::Wide => trimmed(&table(true)),
        })
    }
}

/// Writes to standard output. Unlike `print!` it returns the error: a reader that has seen enough (`| head -1`) is no
/// reason to panic.
pub(crate) fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// A table without the blanks that fill the last column.
fn trimmed(table: &Table) -> String {
    let lines = table.lines();
    lines.fold(String::new(), |text, line| text + line.trim_end() + "\n")
}

/// An empty table in kubectl's look: no lines, upper-case header.
pub(crate) fn plain_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(header);
    for column in table.column_iter_mut() {
        column.set_padding((0, 3));
    }
    table
}
