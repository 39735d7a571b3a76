//! The two texts in which metrics are scraped. Prometheus asks for OpenMetrics; whoever does not ask (curl, promtool, old
//! scrapers) gets the older text, in which a counter's family has the name of its samples.

use std::fmt::Write;

/// Turns OpenMetrics text into Prometheus' text format 0.0.4.
pub(super) fn prometheus(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len() + open_metrics.len() / 16);
    // HELP comes before TYPE, which alone says whether the family's name changes.
    let mut help: Option<(&str, &str)> = None;
    for line in open_metrics.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ');
            continue;
        }
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap_or((rest, "unknown"));
            let (suffix, kind) = match kind {
                "counter" => ("_total", "counter"),
                "info" => ("_info", "gauge"),
                "unknown" => ("", "untyped"),
                "stateset" => ("", "gauge"),
                other => ("", other),
            };
            // Writing to a String does not fail.
            if let Some((of, words)) = help.take()
                && of == name
            {
                let _ = writeln!(text, "# HELP {name}{suffix} {words}");
            }
            let _ = writeln!(text, "# TYPE {name}{suffix} {kind}");
            continue;
        }
        if line.starts_with('#') {
            continue;
        }
        text.push_str(line);
        text.push('\n');
    }
    text
}

/// Whether an `Accept` header asks for OpenMetrics.
pub(super) fn wants_open_metrics(accept: Option<&str>) -> bool {
    accept.is_some_and(|accept| {
        accept.split(',').any(|one| {
            one.split(';')
                .next()
                .is_some_and(|kind| kind.trim() == "application/openmetrics-text")
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_families_get_the_name_of_their_samples() {
        let open_metrics = "# HELP a_things Things.\n# TYPE a_things counter\na_things_total{b=\"# HELP\"} 3\n\
                            # HELP took_seconds Time.\n# TYPE took_seconds histogram\n# UNIT took_seconds seconds\n\
                            took_seconds_count 0\n# HELP c C.\n# TYPE c unknown\nc 1\n# EOF\n";
        let expected = "# HELP a_things_total Things.\n# TYPE a_things_total counter\na_things_total{b=\"# HELP\"} 3\n\
                        # HELP took_seconds Time.\n# TYPE took_seconds histogram\ntook_seconds_count 0\n\
                        # HELP c C.\n# TYPE c untyped\nc 1\n";
        assert_eq!(prometheus(open_metrics), expected);
    }

    #[test]
    fn open_metrics_is_for_those_who_ask() {
        let prometheus =
            "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        assert!(wants_open_metrics(Some(prometheus)));
        for accept in [None, Some("*/*"), Some("text/plain;version=0.0.4")] {
            assert!(!wants_open_metrics(accept), "{accept:?}");
        }
    }
}
