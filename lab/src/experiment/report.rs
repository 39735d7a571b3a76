//! result.json in short.

use std::fmt::Write;

use super::result::Outcome;

/// Steps, errors and connections that are named; result.json has more.
const MOST: usize = 30;

/// The report, as Markdown.
pub fn markdown(outcome: &Outcome) -> String {
    let mut text = String::new();
    // Writing into a string does not fail.
    let _ = write(outcome, &mut text);
    text
}

fn write(outcome: &Outcome, text: &mut String) -> std::fmt::Result {
    let metadata = &outcome.experiment.metadata;
    let verdict = if outcome.holds {
        "holds"
    } else {
        "does not hold"
    };
    writeln!(text, "# Experiment {}: {verdict}\n", metadata.name)?;
    if !metadata.description.is_empty() {
        writeln!(text, "{}\n", metadata.description.trim())?;
    }
    let commit = outcome.commit.as_deref().unwrap_or("unknown");
    writeln!(
        text,
        "ambidex {}, commit {commit}, kernel {}, {} processors, load average {} at the start; {:.0} s.\n",
        outcome.build,
        outcome.environment["kernel"].as_str().unwrap_or("?"),
        outcome.environment["processors"],
        outcome.environment["load_average"].as_str().unwrap_or("?"),
        outcome.seconds_taken
    )?;
    writeln!(text, "| | measured | at most | |\n|---|---|---|---|")?;
    for one in &outcome.assertions {
        let limit = one.limit.map_or_else(String::new, number);
        let mark = match (one.limit, one.holds) {
            (None, _) => "",
            (Some(_), true) => "holds",
            (Some(_), false) => "**fails**",
        };
        writeln!(
            text,
            "| {} | {} | {limit} | {mark} |",
            one.assertion,
            number(one.measured)
        )?;
    }
    for one in outcome.assertions.iter().filter(|one| !one.holds) {
        writeln!(text, "\n**{}**:\n", one.assertion)?;
        for evidence in &one.evidence {
            writeln!(text, "* {evidence}")?;
        }
    }
    let load = &outcome.load;
    let shown = |ms: Option<f64>| ms.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.1}"));
    writeln!(
        text,
        "\n{} busy and {} idle connections, {} new ones ({} due and not made); {} messages, every byte compared in both directions. \
         New connections took {} / {} / {} / {} ms (p50, p99, p99.9, longest); longest wait for an answer {:.1} ms.\n",
        load.busy,
        load.idle,
        load.new,
        load.new_late,
        load.messages,
        shown(load.new_p50_ms),
        shown(load.new_p99_ms),
        shown(load.new_p999_ms),
        shown(load.new_max_ms),
        load.stall_max_ms
    )?;
    writeln!(
        text,
        "| from (s) | to (s) | step | held (ms) |\n|---|---|---|---|"
    )?;
    for step in &outcome.steps {
        let held: Vec<String> = step.switches.iter().map(|one| shown(one.held_ms)).collect();
        let error = step
            .error
            .as_deref()
            .map_or_else(String::new, |error| format!(": **{error}**"));
        writeln!(
            text,
            "| {:.2} | {:.2} | {}{error} | {} |",
            step.began_seconds,
            step.ended_seconds,
            step.what,
            held.join(", ")
        )?;
    }
    writeln!(
        text,
        "\n| device | packets | in tunnels | in the clear | outside the mesh | missed |\n|---|---|---|---|---|---|"
    )?;
    for device in &outcome.devices {
        writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} |",
            device.device,
            device.packets,
            device.tunnel,
            device.clear,
            device.outside,
            device.missed
        )?;
    }
    let outside = outcome.outside_the_mesh.len();
    writeln!(
        text,
        "\nAccess logs: {} entries where connections left, {} where they came. {outside} connections outside the mesh, each named in result.json.",
        outcome.access.outbound, outcome.access.inbound
    )?;
    if !outcome.errors.is_empty() {
        writeln!(text, "\n## Errors\n")?;
        for error in outcome.errors.iter().take(MOST) {
            writeln!(
                text,
                "* {:.2} s: {} ({}): {}",
                error.at_seconds, error.connection, error.by, error.what
            )?;
        }
        if outcome.errors.len() > MOST {
            writeln!(text, "* and {} more", outcome.errors.len() - MOST)?;
        }
    }
    Ok(())
}

/// A number without digits that say nothing.
pub fn number(value: f64) -> String {
    if value.fract() == 0.0 {
        format!("{value:.0}")
    } else {
        let text = format!("{value:.4}");
        text.trim_end_matches('0').to_owned()
    }
}
