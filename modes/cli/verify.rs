//! `ambidex verify`: proof that pods are captured.

use std::fmt::Write;
use std::time::Duration;

use clap::Args;

use super::output::{Format, print};
use super::{Failure, block_on};
use crate::agent::api::Subject;
use crate::agent::verify::{Aspect, Verified};
use crate::agent_client;

/// Between two looks with `--watch`.
const WATCH_EVERY: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// Pod: namespace/name, or its UID (default: the node and all its pods)
    #[arg(conflicts_with = "node")]
    pod: Option<String>,
    /// The node's own objects
    #[arg(long)]
    node: bool,
    /// Go on, and print what changes
    #[arg(long, short)]
    watch: bool,
    #[command(flatten)]
    output: super::output::OutputArgs,
}

pub(crate) fn run(args: VerifyArgs) -> Result<(), Failure> {
    let subject = match (&args.pod, args.node) {
        (Some(pod), _) => Some(super::plan::pod_subject(pod)?),
        (None, true) => Some(Subject::Node),
        (None, false) => None,
    };
    let query = subject.map_or_else(String::new, |subject| format!("?{}", subject.query()));
    let mut before = Vec::new();
    loop {
        let all: Vec<Verified> = block_on(agent_client::get(&format!("/v1/verify{query}")))??;
        if all != before {
            print(&render(&all, args.output.output)?)?;
        }
        if !args.watch {
            let wrong = all.iter().any(|one| !one.is_effective());
            return if wrong { Err(Failure::Differs) } else { Ok(()) };
        }
        before = all;
        std::thread::sleep(WATCH_EVERY);
    }
}

fn render(all: &[Verified], format: Format) -> anyhow::Result<String> {
    Ok(match format {
        Format::Json => format!("{}\n", serde_json::to_string_pretty(all)?),
        Format::Yaml => serde_saphyr::to_string(&all)?,
        Format::Table | Format::Wide => text(all),
    })
}

/// As `linkerd check` writes: what was looked at, and below it what is wrong.
fn text(all: &[Verified]) -> String {
    let mut out = String::new();
    for one in all {
        let drains = if one.drains() { ", draining" } else { "" };
        let mode = one
            .mode
            .map_or_else(String::new, |mode| format!(" ({mode}{drains})"));
        let _ = writeln!(out, "{}{mode}", one.subject);
        for note in &one.notes {
            let _ = writeln!(out, "  - {note}");
        }
        for check in &one.checks {
            let mark = if check.findings.is_empty() {
                '√'
            } else {
                '×'
            };
            let what = match check.aspect {
                Aspect::Proxy if one.drains() => "the proxy lets it go".to_owned(),
                aspect => aspect.to_string(),
            };
            let _ = writeln!(out, "  {mark} {what}");
            for finding in &check.findings {
                let _ = writeln!(out, "      {finding}");
            }
        }
        out.push('\n');
    }
    let those = |wanted: fn(&Verified) -> bool| {
        let those = all.iter().filter(|one| wanted(one));
        let names: Vec<&str> = those.map(|one| one.subject.as_str()).collect();
        names.join(", ")
    };
    let (wrong, draining) = (those(|one| !one.is_effective()), those(Verified::drains));
    let _ = match wrong.as_str() {
        "" => write!(out, "Status: all as it should be"),
        _ => write!(out, "Status: not as it should be: {wrong}"),
    };
    let _ = match draining.as_str() {
        "" => writeln!(out),
        _ => writeln!(out, "; draining: {draining}"),
    };
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::PodState;
    use crate::agent::verify::Check;
    use crate::options::Capture;

    #[test]
    fn what_is_wrong_stands_below_what_was_looked_at() {
        let all = [
            Verified {
                subject: "node".to_owned(),
                uid: None,
                mode: None,
                state: None,
                notes: Vec::new(),
                checks: vec![Check {
                    aspect: Aspect::Objects,
                    findings: Vec::new(),
                }],
            },
            Verified {
                subject: "shop/cart".to_owned(),
                uid: Some("u".to_owned()),
                mode: Some(Capture::Inpod),
                state: Some(PodState::Captured),
                notes: vec!["what comes in is not captured".to_owned()],
                checks: vec![Check {
                    aspect: Aspect::Listeners,
                    findings: vec![
                        "nobody listens on port 15001 in the pod's namespace".to_owned(),
                    ],
                }],
            },
        ];
        assert_eq!(
            text(&all),
            "node\n  √ kernel objects are in place\n\nshop/cart (inpod)\n  - what comes in is not captured\n  × the proxy listens\n      \
             nobody listens on port 15001 in the pod's namespace\n\nStatus: not as it should be: shop/cart\n"
        );
    }

    #[test]
    fn a_pod_that_drains_is_said_to_and_is_not_wrong_for_that() {
        let draining = |findings| Verified {
            subject: "shop/cart".to_owned(),
            uid: Some("u".to_owned()),
            mode: Some(Capture::Node),
            state: Some(PodState::Draining),
            notes: Vec::new(),
            checks: vec![Check {
                aspect: Aspect::Proxy,
                findings,
            }],
        };
        assert_eq!(
            text(&[draining(Vec::new())]),
            "shop/cart (node, draining)\n  √ the proxy lets it go\n\n\
             Status: all as it should be; draining: shop/cart\n"
        );
        assert!(text(&[draining(vec!["x".to_owned()])]).contains("not as it should be: shop/cart"));
    }
}
