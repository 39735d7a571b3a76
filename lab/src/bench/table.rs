//! What is printed: proofs and results as tables.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

use super::load::Latency;
use super::proof::{Leg, Proof};
use super::report::Report;
use super::variant::Variant;

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
        "OF NONE",
        "P50 us",
        "P99 us",
        "P99.9 us",
        "PROXIES CPU s",
        "MACHINE CPU s",
        "PER",
    ]);
    for line in report.summarize() {
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
            line.ratio_to_none
                .map_or_else(dash, |ratio| format!("{ratio:.2}")),
            latency(|latency| Some(latency.p50)),
            latency(|latency| Some(latency.p99)),
            latency(|latency| latency.p999),
            line.proxies_cpu
                .map_or_else(dash, |cpu| format!("{:.3}", cpu.median)),
            format!("{:.3}", line.machine_cpu.median),
            line.case.work_unit().to_owned(),
        ]);
    }
    for index in [2, 3, 5, 6, 7, 8, 9, 10] {
        if let Some(column) = table.column_mut(index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    trimmed(&table)
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
    if share > 0.02 {
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

fn plain(header: &[&str]) -> Table {
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
fn trimmed(table: &Table) -> String {
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
    use std::path::Path as FilePath;

    use super::*;
    use crate::bench::accounting::Cpu;
    use crate::bench::case::{Case, Load, Path};
    use crate::bench::counters::Counters;
    use crate::bench::environment::Environment;
    use crate::bench::report::Sample;
    use crate::bench::run::BenchSpec;
    use crate::topology::{Overlay, Programs};

    #[test]
    fn medians_and_ratios_come_from_the_samples() {
        let case = Case {
            path: Path::CrossNode,
            load: Load::ALL[0],
        };
        let spec = BenchSpec {
            variants: vec![Variant::None, Variant::Inpod],
            cases: vec![case],
            rounds: 3,
            seconds: 1,
            overlay: Overlay::Auto,
            programs: Programs::beside(FilePath::new("/x/ambidex")),
            out: "/x".into(),
            build: "1.2.3 release".to_owned(),
        };
        let mut report = Report::new(&spec, Environment::of_this_machine());
        for (variant, values) in [
            (Variant::None, [10.0, 12.0, 8.0]),
            (Variant::Inpod, [4.0, 5.0, 99.0]),
        ] {
            for (round, value) in values.into_iter().enumerate() {
                report.samples.push(Sample {
                    variant: variant.clone(),
                    case,
                    round,
                    begun_seconds: 0.0,
                    value,
                    work: 2e9,
                    latency_us: None,
                    extra: Default::default(),
                    proxies_cpu: Cpu {
                        user: 1.0,
                        system: 2.0,
                        interrupts: 0.0,
                    },
                    machine_cpu: Cpu {
                        user: 4.0,
                        system: 2.0,
                        interrupts: 2.0,
                    },
                    stolen_seconds: 0.0,
                    wall_seconds: 1.0,
                    overlays: [Counters::default(); 2],
                });
            }
        }
        let line = report.summarize()[1].clone();
        assert_eq!((line.samples, line.ratio_to_none), (3, Some(0.5)));
        let text = results(&report);
        let line = text.lines().find(|line| line.contains("inpod")).unwrap();
        for part in ["5.00", "4.00-99.00", "0.50", "1.500", "4.000"] {
            assert!(line.contains(part), "{part} in {line}");
        }
        assert!(conditions(&report).contains("ambidex 1.2.3 release"));
    }
}
