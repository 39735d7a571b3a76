//! What is printed: proofs and results as tables.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

use super::load::Latency;
use super::proof::{Leg, Proof};
use super::report::{Ended, Report, Sample};
use super::self_check::SelfCheck;
use super::statistics::Estimate;
use super::statistics::drift::LIMIT;
use super::summary::{self, FOREIGN_LIMIT, Line, summarize};
use super::variant::Variant;
use super::verdict::{self, Flaw, RELAY_CASE};

/// A hypervisor that took more than this share of the processors away makes samples doubtful.
const STOLEN_LIMIT: f64 = 0.02;

/// One line per proof, with the facts that it stands on.
pub fn proofs(proofs: &[Proof]) -> String {
    let mut table = plain(&[
        "VARIANT",
        "PATH",
        "PROOF",
        "15008 TLS RECORDS",
        "CLIENT SEEN AS",
        "THROUGH ISTIOOUT",
        "THROUGH ISTIOIN",
        "MARKER SEEN ON",
    ]);
    for proof in proofs {
        let seen: Vec<&str> = proof
            .taps
            .iter()
            .filter(|tap| tap.marker)
            .map(|tap| tap.tap.as_str())
            .collect();
        // The same records pass several taps.
        let records = proof.taps.iter().map(|tap| tap.tls_records).max();
        table.add_row([
            proof.variant.to_string(),
            proof.path.to_string(),
            if proof.holds() { "holds" } else { "FAILS" }.to_owned(),
            records
                .filter(|records| *records > 0)
                .map_or_else(dash, |records| records.to_string()),
            proof.client_seen.map_or_else(dash, |seen| seen.to_string()),
            leg(&proof.client_leg),
            proof.tunnel_leg.as_ref().map_or_else(dash, leg),
            or_dash(seen.join(", ")),
        ]);
    }
    trimmed(&table)
}

/// Shares there and back, or `0` if not a segment passed.
fn leg(leg: &Leg) -> String {
    let percent =
        |share: Option<f64>| share.map_or_else(dash, |share| format!("{:.1}%", share * 100.0));
    if leg.segments == [0, 0] {
        return "0".to_owned();
    }
    let [there, back] = leg.shares().map(percent);
    format!("{there}/{back} {} SYN", leg.syns)
}

/// One line per case and variant.
pub fn results(report: &Report) -> String {
    let mut table = plain(&[
        "CASE",
        "VARIANT",
        "MEDIAN",
        "MIN-MAX",
        "UNIT",
        "OF NONE [95 %]",
        "OF RELAY [95 %]",
        "P50 us",
        "P99 us",
        "P99.9 us",
        "PROXIES CPU s",
        "MACHINE CPU s",
        "PER",
        "CPU OF RELAY [95 %]",
        "REMARKS",
    ]);
    for line in summarize(report) {
        let show = |value| line.case.show(value);
        let latency = |percentile: fn(Latency) -> Option<f64>| {
            line.latency_us
                .and_then(percentile)
                .map_or_else(dash, |value| format!("{value:.0}"))
        };
        table.add_row([
            line.case.to_string(),
            line.variant.to_string(),
            show(line.value.median),
            format!("{}-{}", show(line.value.min), show(line.value.max)),
            line.case.unit().to_owned(),
            line.of_none.map_or_else(dash, |of| estimate(of.value)),
            line.of_relay.map_or_else(dash, |of| estimate(of.value)),
            latency(|latency| Some(latency.p50)),
            latency(|latency| Some(latency.p99)),
            latency(|latency| latency.p999),
            line.proxies_cpu
                .map_or_else(dash, |cpu| format!("{:.3}", cpu.median)),
            format!("{:.3}", line.machine_cpu.median),
            line.case.work_unit().to_owned(),
            line.of_relay
                .and_then(|of| of.proxies_cpu)
                .map_or_else(dash, estimate),
            remarks(report, &line),
        ]);
    }
    for index in [2, 3, 5, 6, 7, 8, 9, 10, 11, 13] {
        if let Some(column) = table.column_mut(index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    trimmed(&table)
}

/// What was equal between the variants: one line per property, and where it was not, one per value.
pub fn equality(report: &Report) -> String {
    let mut table = plain(&["PROPERTY", "EQUAL", "VALUE"]);
    for property in &report.equality {
        let mut values: Vec<(&String, Vec<&str>)> = Vec::new();
        for (variant, value) in &property.values {
            match values.iter_mut().find(|(known, _)| *known == value) {
                Some((_, variants)) => variants.push(variant),
                None => values.push((value, vec![variant])),
            }
        }
        let what = &property.what;
        if let ([(value, _)], true) = (values.as_slice(), property.equal) {
            table.add_row([what.as_str(), "yes", value.as_str()]);
            continue;
        }
        for (value, variants) in values {
            let value = format!("{}: {value}", variants.join(", "));
            table.add_row([what.as_str(), "NO", value.as_str()]);
        }
    }
    trimmed(&table)
}

/// One line per comparison of a self-check.
pub fn comparisons(check: &SelfCheck) -> String {
    let mut table = plain(&[
        "CASE",
        "COMPARED",
        "SECOND OF FIRST [95 %]",
        "P",
        "P OF ALL",
        "DIFFERENT",
    ]);
    for comparison in &check.comparisons {
        table.add_row([
            comparison.case.to_string(),
            comparison.measure.to_string(),
            estimate(comparison.ratio),
            format!("{:.4}", comparison.p),
            format!("{:.3}", comparison.p_of_all),
            if comparison.differs() { "yes" } else { "no" }.to_owned(),
        ]);
    }
    trimmed(&table)
}

/// `0.34 [0.32, 0.36]`, or without an interval where there were too few rounds.
pub fn estimate(estimate: Estimate) -> String {
    match estimate.interval {
        Some([low, high]) => format!("{:.2} [{low:.2}, {high:.2}]", estimate.value),
        None => format!("{:.2}", estimate.value),
    }
}

/// What makes a line doubtful.
fn remarks(report: &Report, line: &Line) -> String {
    let mut remarks = Vec::new();
    let flaws = verdict::flaws(report);
    if line.variant == Variant::Relay
        && line.case == RELAY_CASE
        && flaws.iter().any(|flaw| matches!(flaw, Flaw::Void(_)))
    {
        remarks.push("VOID".to_owned());
    }
    if line.samples < report.rounds {
        remarks.push(format!("{} samples of {}", line.samples, report.rounds));
    }
    let is_baseline = summary::baseline(report) == Some(&line.variant);
    if let Some(drift) = line
        .drift
        .filter(|drift| is_baseline && drift.abs() > LIMIT)
    {
        remarks.push(format!("drift {:+.0} %", drift * 100.0));
    }
    if line.foreign > FOREIGN_LIMIT {
        remarks.push(format!("others up to {:.0} %", line.foreign * 100.0));
    }
    if line.stolen > STOLEN_LIMIT {
        remarks.push(format!("stolen up to {:.0} %", line.stolen * 100.0));
    }
    remarks.extend(enrolment(report, line));
    or_dash(remarks.join(", "))
}

/// Whose processor time an enrolment took (medians), and how far it was from keeping all processors busy.
fn enrolment(report: &Report, line: &Line) -> Option<String> {
    let samples = report.of(&line.variant, line.case);
    let median = |key: &str| {
        let found = samples.iter().filter_map(|sample| sample.extra.get(key));
        let mut values: Vec<f64> = found.copied().collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    };
    let parts = ["agent", "iptables", "plugin", "proxy"].map(|part| {
        let spent = median(&format!("{part}_cpu_ms_per_pod"))?;
        Some(format!("{part} {spent:.2}"))
    });
    let parts: Option<Vec<String>> = parts.into_iter().collect();
    let parts = format!("CPU ms/pod: {}", parts?.join(" "));
    Some(match median("wall_by_cpu") {
        Some(ratio) => {
            let processors = report.environment.processors;
            format!("wall {ratio:.2} x CPU/{processors}, {parts}")
        }
        None => parts,
    })
}

/// What has to be known to read the results.
pub fn conditions(report: &Report) -> String {
    let environment = &report.environment;
    let overlay = match &report.overlay {
        Some(kind) if kind == "vxlan" && report.variants.iter().any(|v| v.is_node()) => {
            "vxlan in geneve's place".to_owned()
        }
        Some(kind) => kind.clone(),
        None => "none".to_owned(),
    };
    let mut text = format!(
        "overlay {overlay}; {} rounds of {} s, interleaved in rotating order; ambidex {}\n\
         kernel {}, {} x {}, MTU {}, congestion control {}; {:.0} s in all",
        report.rounds,
        report.seconds_per_sample,
        report.build,
        environment.kernel,
        environment.processors,
        environment.processor,
        environment.mtu,
        environment.congestion_control,
        report.seconds_taken
    );
    if let Some(verdict) = verdict(report) {
        text.push_str(&format!("\n{verdict}"));
    }
    let drifted: Vec<String> = summary::drifted(report)
        .into_iter()
        .map(|(case, drift)| format!("{case} {:+.0} %", drift * 100.0))
        .collect();
    if !drifted.is_empty() {
        text.push_str(&format!(
            "\nwarning: the baseline was another one in the second half of the rounds: {}",
            drifted.join(", ")
        ));
    }
    for property in report.equality.iter().filter(|property| !property.equal) {
        text.push_str(&format!(
            "\nwarning: the variants differ in more than the capture: {}",
            property.what
        ));
    }
    let foreign = |sample: &&Sample| {
        let processors = environment.processors.max(1) as f64;
        sample.foreign_seconds > FOREIGN_LIMIT * sample.wall_seconds * processors
    };
    let doubtful = report.samples.iter().filter(foreign).count();
    if doubtful > 0 {
        text.push_str(&format!(
            "\nwarning: in {doubtful} of {} samples others had more than {:.0} % of the processors",
            report.samples.len(),
            FOREIGN_LIMIT * 100.0
        ));
    }
    let stolen: f64 = report
        .samples
        .iter()
        .map(|sample| sample.stolen_seconds)
        .sum();
    let wall: f64 = report
        .samples
        .iter()
        .map(|sample| sample.wall_seconds)
        .sum();
    let share = stolen / (wall * environment.processors.max(1) as f64);
    if share > STOLEN_LIMIT {
        text.push_str(&format!(
            "\nwarning: the hypervisor took {:.0} % of the processors away while measuring",
            share * 100.0
        ));
    }
    if let Some(doubt) = environment.doubt() {
        text.push_str(&format!("\nwarning: {doubt}"));
    }
    if !report.variants.contains(&Variant::None) {
        text.push_str("\nno ratios, because the variant none was not measured");
    }
    text
}

/// Why a report must not be believed, if it must not.
pub fn verdict(report: &Report) -> Option<String> {
    match &report.ended {
        Ended::Finished => None,
        Ended::Running => Some("NOT FINISHED".to_owned()),
        Ended::Interrupted => Some("INTERRUPTED: not everything was measured".to_owned()),
        Ended::Failed(why) => Some(format!("FAILED: {why}")),
        Ended::Void(why) => Some(format!("VOID: {why}")),
    }
}

pub(super) fn plain(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(header);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

/// Without the blanks at the ends of lines.
pub(super) fn trimmed(table: &Table) -> String {
    let lines: Vec<String> = table
        .lines()
        .map(|line| line.trim_end().to_owned())
        .collect();
    lines.join("\n")
}

fn dash() -> String {
    "-".to_owned()
}

fn or_dash(text: String) -> String {
    if text.is_empty() { dash() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::examples;

    #[test]
    fn medians_and_ratios_come_from_the_samples() {
        let report = examples::report(
            &[Variant::None, Variant::Inpod],
            &[RELAY_CASE],
            &[
                (Variant::None, &[10.0, 12.0, 8.0]),
                (Variant::Inpod, &[4.0, 5.0, 99.0]),
            ],
        );
        let text = results(&report);
        let line = text.lines().find(|line| line.contains("inpod")).unwrap();
        for part in ["5.00", "4.00-99.00", "0.50 [0.40, ", "1.500", "4.000"] {
            assert!(line.contains(part), "{part} in {line}");
        }
        assert!(conditions(&report).contains("ambidex 1.2.3 release"));
    }

    #[test]
    fn what_makes_numbers_doubtful_is_said_beside_them() {
        let mut report = examples::report(
            &[Variant::None, Variant::Relay],
            &[RELAY_CASE],
            &[
                (Variant::None, &[10.0, 10.0, 8.0, 8.0]),
                (Variant::Relay, &[3.0, 3.0, 3.0, 3.0]),
            ],
        );
        report.environment.processors = 1;
        report.samples[5].foreign_seconds = 0.3;
        report.samples[6].stolen_seconds = 0.4;
        report.summary = summarize(&report);
        report.ended = Ended::Void("the relay was slow".to_owned());
        let text = results(&report);
        let of = |variant: &str| text.lines().find(|line| line.contains(variant)).unwrap();
        assert!(of("none").ends_with("drift -20 %"), "{text}");
        for part in ["VOID", "others up to 30 %", "stolen up to 40 %"] {
            assert!(of("relay").contains(part), "{part} in {text}");
        }
        let text = conditions(&report);
        for part in [
            "VOID: the relay was slow",
            "cross-node/bulk1 -20 %",
            "in 1 of 8 samples others had more than 5 %",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }
}
