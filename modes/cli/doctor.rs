//! `ambidex doctor`: whether this machine can carry a capture.

use std::fmt::Write;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, ValueEnum};
use serde::Serialize;

use super::output::{Format, OutputArgs, print};
use super::{Failure, block_on};
use crate::doctor::collect::{Sources, collect};
use crate::doctor::{
    Facts, Finding, Findings, Recommendation, Severity, catalogue, evaluate, recommended,
};
use crate::options::{Capture, InpodRules};

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Look only at what concerns this capture
    #[arg(long, value_enum, default_value_t = Asked::All)]
    mode: Asked,
    /// Look at a machine that was recorded with --record, instead of at this one
    #[arg(long, value_name = "FILE", conflicts_with_all = ["record", "explain"])]
    facts: Option<PathBuf>,
    /// Write what is known of this machine to a file, too
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
    /// Print the table of all checks, in Markdown
    #[arg(long)]
    explain: bool,
    /// Directory of the container runtime's network configurations
    #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d")]
    cni_conf_dir: PathBuf,
    /// UDP port that the agent's tunnels are to have
    #[arg(long, env = "AMBIDEX_GENEVE_PORT", value_name = "PORT")]
    geneve_port: Option<u16>,
    /// How the agent is to write rules in pods
    #[arg(long, value_enum, value_name = "STYLE")]
    inpod_rules: Option<InpodRules>,
    #[command(flatten)]
    output: OutputArgs,
}

/// Which captures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Asked {
    Node,
    Inpod,
    All,
}

impl Asked {
    fn modes(self) -> &'static [Capture] {
        match self {
            Asked::Node => &[Capture::Node],
            Asked::Inpod => &[Capture::Inpod],
            Asked::All => &[Capture::Node, Capture::Inpod],
        }
    }
}

/// What is printed as JSON and YAML.
#[derive(Debug, Serialize)]
struct Report<'a> {
    kernel: &'a str,
    recommended: &'a Recommendation,
    findings: &'a [Finding],
}

pub(crate) fn run(args: DoctorArgs) -> Result<(), Failure> {
    if args.explain {
        print(&catalogue::explained())?;
        return Ok(());
    }
    let facts = match &args.facts {
        Some(path) => recorded(path)?,
        None => block_on(collect(&Sources {
            overlay_port: args.geneve_port,
            inpod_rules: args.inpod_rules,
            ..Sources::from_env(args.cni_conf_dir)
        }))?,
    };
    if let Some(path) = &args.record {
        let text = format!("{}\n", serde_json::to_string_pretty(&facts)?);
        std::fs::write(path, text).with_context(|| path.display().to_string())?;
    }
    let all = evaluate(&facts);
    let recommended = recommended(&all);
    let findings = all.of(args.mode.modes());
    let report = Report {
        kernel: &facts.kernel,
        recommended: &recommended,
        findings: &findings.findings,
    };
    print(&match args.output.output {
        Format::Json => format!("{}\n", serde_json::to_string_pretty(&report)?),
        Format::Yaml => serde_saphyr::to_string(&report)?,
        Format::Table | Format::Wide => {
            let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            text(&findings, &recommended, args.mode, colour)
        }
    })?;
    let breaks = |mode: &Capture| findings.that_break(*mode).next().is_some();
    if args.mode.modes().iter().any(breaks) {
        return Err(Failure::Differs);
    }
    Ok(())
}

fn recorded(path: &Path) -> anyhow::Result<Facts> {
    let name = || path.display().to_string();
    let text = std::fs::read(path).with_context(name)?;
    serde_json::from_slice(&text).with_context(name)
}

/// As `linkerd check` writes: what was looked at, and below it what is wrong and what mends it.
fn text(findings: &Findings, recommended: &Recommendation, asked: Asked, colour: bool) -> String {
    let paint = |severity: Severity, text: &str| {
        let code = match severity {
            Severity::Ok => 32,
            Severity::Warn => 33,
            Severity::Fail => 31,
        };
        match colour {
            true => format!("\x1b[{code}m{text}\x1b[0m"),
            false => text.to_owned(),
        }
    };
    let mut out = String::new();
    for of_check in findings.findings.chunk_by(|a, b| a.id == b.id) {
        let [first, ..] = of_check else { continue };
        let worst = of_check.iter().map(|finding| finding.severity).max();
        let worst = worst.unwrap_or(first.severity);
        let mark = match worst {
            Severity::Ok => "√",
            Severity::Warn => "‼",
            Severity::Fail => "×",
        };
        let _ = writeln!(out, "{} {}: {}", paint(worst, mark), first.id, first.check);
        let alike = |a: &Finding, b: &Finding| a.severity == b.severity && a.modes == b.modes;
        for findings in of_check.chunk_by(alike) {
            told_together(&mut out, findings);
        }
    }
    out.push('\n');
    for mode in asked.modes() {
        let breaks = findings.that_break(*mode).count();
        let status = match breaks {
            0 => paint(Severity::Ok, "√ nothing breaks it"),
            1 => paint(Severity::Fail, "× one finding breaks it"),
            n => paint(Severity::Fail, &format!("× {n} findings break it")),
        };
        let _ = writeln!(out, "{mode}: {status}");
    }
    if findings.warnings() > 0 {
        let _ = writeln!(out, "warnings: {}", findings.warnings());
    }
    let _ = writeln!(out, "recommended: {recommended}");
    out
}

/// Findings of one check that are equally bad: what they have in common is told once.
fn told_together(out: &mut String, findings: &[Finding]) {
    let [first, ..] = findings else { return };
    let verb = match first.severity {
        Severity::Ok => return,
        Severity::Warn => "concerns",
        Severity::Fail => "breaks",
    };
    for finding in findings {
        let _ = writeln!(out, "    {}: {}", finding.object, finding.found);
    }
    let modes: Vec<String> = first.modes.iter().map(ToString::to_string).collect();
    let _ = writeln!(out, "      {verb} {}: {}", modes.join(" and "), first.why);
    for findings in findings.chunk_by(|a, b| a.fix == b.fix) {
        if let [first, ..] = findings {
            let _ = writeln!(out, "      fix: {}", first.fix);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(id: &str, severity: Severity, object: &str) -> Finding {
        let told = |text: &str| match severity {
            Severity::Ok => String::new(),
            _ => text.to_owned(),
        };
        Finding {
            id: id.to_owned(),
            check: "it is fine".to_owned(),
            severity,
            modes: vec![Capture::Node],
            object: object.to_owned(),
            found: told("is not"),
            why: told("it matters"),
            fix: told("mend it"),
        }
    }

    #[test]
    fn what_is_wrong_stands_below_what_was_looked_at() {
        let findings = Findings {
            findings: vec![
                finding("host/a", Severity::Ok, ""),
                finding("node/b", Severity::Warn, "x"),
                finding("node/b", Severity::Fail, "y"),
                finding("node/b", Severity::Fail, "z"),
            ],
        };
        let recommended = recommended(&findings);
        assert_eq!(
            text(&findings, &recommended, Asked::Node, false),
            "√ host/a: it is fine\n\
             × node/b: it is fine\n\
            \x20   x: is not\n\
            \x20     concerns node: it matters\n\
            \x20     fix: mend it\n\
            \x20   y: is not\n\
            \x20   z: is not\n\
            \x20     breaks node: it matters\n\
            \x20     fix: mend it\n\n\
             node: × 2 findings break it\n\
             warnings: 1\n\
             recommended: inpod: node capture is broken by node/b\n"
        );
    }
}
