//! Accounts as tables.

use comfy_table::Table;

use super::{CostReport, Ends};
use crate::bench::table::{plain, trimmed};

/// All tables, with the gates at the end.
pub fn all(report: &CostReport) -> String {
    let note = report.syscall_note.as_deref().unwrap_or_default();
    let tables = [
        loads(report),
        processes(report),
        memory(report),
        enrolments(report),
        idle(report),
        objects(report),
        gates(report),
    ];
    let texts = tables
        .iter()
        .map(trimmed)
        .filter(|text| text.lines().count() > 1);
    let mut text = texts.collect::<Vec<_>>().join("\n\n");
    if !note.is_empty() {
        text.push_str(&format!("\n\n{note}"));
    }
    text
}

fn loads(report: &CostReport) -> Table {
    let mut table = plain(&[
        "CASE",
        "VARIANT",
        "VALUE",
        "UNIT",
        "PER",
        "MACHINE CPU us",
        "PROXIES CPU us",
        "SWITCHES",
        "SYSCALLS",
        "WIRE PACKETS",
        "WIRE BYTES",
    ]);
    for (variant, load) in report
        .variants
        .iter()
        .flat_map(|cost| cost.loads.iter().map(|load| (&cost.variant, load)))
    {
        table.add_row([
            load.case.to_string(),
            variant.to_string(),
            load.case.load.show(load.value),
            load.value_unit.to_owned(),
            load.operation.to_owned(),
            number(load.machine_cpu_us_per_operation),
            number(load.proxies_cpu_us_per_operation),
            number(load.proxies_switches_per_operation),
            load.proxies_syscalls_per_operation
                .map_or_else(|| "-".to_owned(), number),
            number(load.wire_packets_per_operation),
            number(load.wire_bytes_per_operation),
        ]);
    }
    table
}

fn processes(report: &CostReport) -> Table {
    let mut table = plain(&[
        "PROCESS",
        "CASE",
        "VARIANT",
        "USER s",
        "SYSTEM s",
        "VOLUNTARY SWITCHES",
        "INVOLUNTARY SWITCHES",
    ]);
    for cost in &report.variants {
        for load in &cost.loads {
            for process in &load.processes {
                table.add_row([
                    process.process.clone(),
                    load.case.to_string(),
                    cost.variant.to_string(),
                    number(process.cpu_seconds.user),
                    number(process.cpu_seconds.system),
                    process.switches.voluntary.to_string(),
                    process.switches.involuntary.to_string(),
                ]);
            }
        }
    }
    table
}

fn memory(report: &CostReport) -> Table {
    let mut table = plain(&[
        "MEMORY",
        "VARIANT",
        "PROXY RSS KiB",
        "PROXY PSS KiB",
        "AGENT RSS KiB",
        "AGENT PSS KiB",
        "PROXY SOCKETS",
        "PROXY FDS",
        "AGENT FDS",
    ]);
    for cost in &report.variants {
        for at in &cost.pods {
            table.add_row([
                format!("{} pods", at.pods),
                cost.variant.to_string(),
                at.proxy.memory.rss_kib.to_string(),
                at.proxy.memory.pss_kib.to_string(),
                at.agent.memory.rss_kib.to_string(),
                at.agent.memory.pss_kib.to_string(),
                at.proxy.descriptors.sockets.to_string(),
                at.proxy.descriptors.descriptors.to_string(),
                at.agent.descriptors.descriptors.to_string(),
            ]);
        }
        for around in &cost.memory_around_load {
            let moments = [
                ("before load", around.before),
                ("right after load", around.after),
                ("some time after load", around.settled),
            ];
            for (moment, memory) in moments {
                table.add_row([
                    format!("{}, {moment}", around.process),
                    cost.variant.to_string(),
                    memory.rss_kib.to_string(),
                    memory.pss_kib.to_string(),
                ]);
            }
        }
    }
    table
}

fn enrolments(report: &CostReport) -> Table {
    let mut table = plain(&[
        "ENROLMENTS, p50/p99 ms",
        "VARIANT",
        "PLUGIN",
        "AGENT",
        "RECORD",
        "ADD TO ACK",
        "PLAN",
        "APPLY",
    ]);
    for cost in &report.variants {
        for at in &cost.pods {
            let Some(steps) = &at.enrolment else {
                continue;
            };
            let of = |step: &super::Percentiles| {
                format!("{}/{}", number(step.p50 / 1e3), number(step.p99 / 1e3))
            };
            table.add_row([
                format!("{} up to {} pods", steps.plugin_us.samples, at.pods),
                cost.variant.to_string(),
                of(&steps.plugin_us),
                of(&steps.total_us),
                of(&steps.record_us),
                of(&steps.announce_us),
                of(&steps.plan_us),
                of(&steps.apply_us),
            ]);
        }
    }
    table
}

fn idle(report: &CostReport) -> Table {
    let mut table = plain(&[
        "IDLE, client/server end",
        "VARIANT",
        "OPEN: KiB EACH",
        "SOCKETS EACH",
        "CLOSED: KiB LEFT OF EACH",
        "SOCKETS LEFT OF EACH",
    ]);
    for cost in &report.variants {
        let kinds = [
            ("connections", &cost.idle_connections),
            ("tunnels", &cost.idle_tunnels),
        ];
        for (kind, idle) in kinds {
            let Some(idle) = idle else {
                continue;
            };
            let both = |ends: Ends| format!("{}/{}", number(ends.client), number(ends.server));
            table.add_row([
                format!("{} {kind}", idle.connections),
                cost.variant.to_string(),
                both(idle.open_kib),
                both(idle.open_sockets),
                both(idle.unused_kib),
                both(idle.unused_sockets),
            ]);
        }
    }
    table
}

fn objects(report: &CostReport) -> Table {
    let mut table = plain(&[
        "OBJECTS PER POD",
        "VARIANT",
        "IPTABLES RULES",
        "POLICY RULES",
        "ROUTES",
        "SET MEMBERS",
        "DEVICES",
        "LISTENING SOCKETS",
        "CONNTRACK",
    ]);
    for cost in &report.variants {
        let Some(at) = cost.pods.last() else {
            continue;
        };
        let places = [
            ("on the node", at.node_objects_per_pod),
            ("in the proxy's namespace", at.proxy_objects_per_pod),
            ("in the pod", at.pod_objects),
        ];
        for (place, objects) in places {
            table.add_row([
                place.to_owned(),
                cost.variant.to_string(),
                number(objects.iptables_rules),
                number(objects.policy_rules),
                number(objects.routes),
                number(objects.set_members),
                number(objects.devices),
                number(objects.listening_sockets),
                number(objects.conntrack_entries),
            ]);
        }
    }
    table
}

fn gates(report: &CostReport) -> Table {
    let mut table = plain(&["GATE", "VARIANT", "LIMIT", "FOUND", "STATUS"]);
    for gate in &report.gates {
        table.add_row([
            gate.gate.clone(),
            gate.variant.to_string(),
            number(gate.limit),
            gate.found.map_or_else(|| "-".to_owned(), number),
            format!("gate: {}", gate.status),
        ]);
    }
    table
}

/// As many digits as mean something.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}
