//! `ambidex bench report`: the tables of a document from committed results files.
//!
//! A document has sections between `<!-- results: NAME -->` and `<!-- end -->`; what is between them is generated from
//! `NAME.json`. Everything else is written by hand and stays.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use lab::bench::report::Report;
use lab::bench::table;

use crate::cli::Failure;

/// Exit code when a document is not what its results say.
const DRIFTED: u8 = 3;
const BEGIN: &str = "<!-- results: ";
const BEGIN_ENDS: &str = " -->";
const END: &str = "<!-- end -->";

#[derive(Debug, Args)]
pub(super) struct DocumentArgs {
    /// Directory of results files
    directory: PathBuf,
    /// Document whose tables are generated
    #[arg(long, value_name = "FILE")]
    write: PathBuf,
    /// Write nothing; exit code 3 if the document is not what would be written
    #[arg(long)]
    check: bool,
}

pub(super) fn run(args: &DocumentArgs) -> Result<(), Failure> {
    let name = args.write.display();
    let text = fs::read_to_string(&args.write).with_context(|| format!("read {name}"))?;
    let wanted = generate(&text, &args.directory).with_context(|| name.to_string())?;
    if args.check {
        if text != wanted {
            eprintln!("{name} is not what the results say: generate it without --check");
            return Err(Failure::Code(DRIFTED));
        }
        return Ok(());
    }
    fs::write(&args.write, wanted).with_context(|| format!("write {name}"))?;
    Ok(())
}

fn generate(text: &str, directory: &Path) -> Result<String> {
    let mut rest = text;
    let mut result = String::new();
    let mut used = Vec::new();
    while let Some((before, after)) = rest.split_once(BEGIN) {
        let (name, after) = after
            .split_once(BEGIN_ENDS)
            .context("a section whose first line does not end")?;
        let (_, after) = after
            .split_once(END)
            .with_context(|| format!("section {name} has no {END}"))?;
        if !name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        {
            bail!("section {name:?}: want letters, digits and -");
        }
        let report = Report::load(&directory.join(format!("{name}.json")))?;
        result.push_str(before);
        result.push_str(&format!(
            "{BEGIN}{name}{BEGIN_ENDS}\n{}{END}",
            section(&report)
        ));
        used.push(name.to_owned());
        rest = after;
    }
    result.push_str(rest);
    // Results that nobody reads would go stale unseen.
    for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let path = entry?.path();
        let stem = path
            .file_stem()
            .and_then(|stem| stem.to_str())
            .unwrap_or_default();
        if path.extension().is_some_and(|end| end == "json")
            && !used.iter().any(|name| name == stem)
        {
            bail!("{} is in no section", path.display());
        }
    }
    Ok(result)
}

fn section(report: &Report) -> String {
    let parts = [
        table::results(report),
        table::equality(report),
        table::conditions(report),
    ];
    format!("\n```text\n{}\n```\n\n", parts.join("\n\n"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn sections_that_cannot_be_filled_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let error = |text: &str| format!("{:#}", generate(text, directory.path()).unwrap_err());
        assert!(error("<!-- results: quick -->").contains("section quick has no"));
        assert!(error("<!-- results: ../x --><!-- end -->").contains("want letters"));
        assert!(error("<!-- results: gone --><!-- end -->").contains("gone.json"));
        assert_eq!(
            generate("no section", directory.path()).unwrap(),
            "no section"
        );
        fs::write(directory.path().join("lost.json"), "{}").unwrap();
        assert!(error("no section").contains("lost.json is in no section"));
    }
}
