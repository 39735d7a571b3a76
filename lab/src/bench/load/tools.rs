//! Traffic from tools that everybody knows: iperf3 for bulk streams, wrk for requests.

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::process::output_of_client;
use super::servers::BULK_PORT;
use super::{ENOUGH_FOR_P999, Latency, Measured, Target};
use crate::bench::case::Way;
use crate::topology::APPLICATION_PORT;

/// wrk's own report ends at the 99th percentile; this adds what is beyond, in microseconds.
const WRK_SCRIPT: &str = "done = function(summary, latency, requests)\n  \
    io.write(string.format(\"Percentiles: %f %f %f\\n\", latency:percentile(50), latency:percentile(99), \
    latency:percentile(99.9)))\nend\n";

/// TCP streams.
pub fn iperf3(target: &Target<'_>, streams: u8, way: Way) -> Result<Measured> {
    let mut arguments = vec!["-c".to_owned(), target.server.to_string()];
    arguments.extend(["-p".to_owned(), BULK_PORT.to_string()]);
    arguments.extend(["-P".to_owned(), streams.to_string()]);
    arguments.extend(["-t".to_owned(), target.seconds.to_string()]);
    arguments.extend(["-J", "--connect-timeout", "5000"].map(str::to_owned));
    if way == Way::Down {
        arguments.push("-R".to_owned());
    }
    let text = output_of_client(&target.client, "iperf3", &arguments, target.limit())?;
    iperf3_result(&text)
}

/// Requests, with more arguments for wrk.
pub fn wrk(target: &Target<'_>, connections: u8, more: &[&str]) -> Result<Measured> {
    let script = target.stage.lab.dir().join("percentiles.lua");
    std::fs::write(&script, WRK_SCRIPT).with_context(|| script.display().to_string())?;
    let mut arguments = vec!["-t".to_owned(), "1".to_owned()];
    arguments.extend(["-c".to_owned(), connections.to_string()]);
    arguments.extend(["-d".to_owned(), format!("{}s", target.seconds)]);
    arguments.extend(["-s".to_owned(), script.display().to_string()]);
    arguments.extend(["--timeout", "5s"].map(str::to_owned));
    arguments.extend(more.iter().map(|&word| word.to_owned()));
    arguments.push(format!("http://{}:{APPLICATION_PORT}/", target.server));
    let text = output_of_client(&target.client, "wrk", &arguments, target.limit())?;
    wrk_result(&text)
}

fn iperf3_result(text: &str) -> Result<Measured> {
    let json: Value = serde_json::from_str(text).context("iperf3 printed no JSON")?;
    let received = &json["end"]["sum_received"];
    let bits = received["bits_per_second"]
        .as_f64()
        .with_context(|| format!("iperf3 reports no result: {}", json["error"]))?;
    let bytes = received["bytes"]
        .as_f64()
        .context("iperf3 reports no bytes")?;
    if bytes <= 0.0 {
        bail!("iperf3 transferred nothing");
    }
    Ok(Measured {
        value: bits / 1e9,
        work: bytes,
        ..Measured::default()
    })
}

fn wrk_result(text: &str) -> Result<Measured> {
    let after = |label: &str| {
        text.lines()
            .find_map(|line| line.trim().strip_prefix(label))
            .map(str::trim)
    };
    let value: f64 = after("Requests/sec:")
        .context("wrk reports no rate")?
        .parse()?;
    let requests: f64 = text
        .lines()
        .find_map(|line| line.trim().split_once(" requests in "))
        .context("wrk reports no requests")?
        .0
        .parse()?;
    let mut errors = 0;
    if let Some(line) = after("Socket errors:") {
        errors += line
            .split(',')
            .filter_map(|part| part.trim().rsplit(' ').next()?.parse::<u64>().ok())
            .sum::<u64>();
    }
    if let Some(line) = after("Non-2xx or 3xx responses:") {
        errors += line.parse::<u64>()?;
    }
    let percentiles: Vec<f64> = after("Percentiles:")
        .context("wrk reports no percentiles")?
        .split_ascii_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    let &[p50, p99, p999] = percentiles.as_slice() else {
        bail!("wrk reports other percentiles than asked for: {percentiles:?}");
    };
    let latency_us = Some(Latency {
        p50,
        p99,
        p999: (requests >= ENOUGH_FOR_P999).then_some(p999),
    });
    Ok(Measured {
        value,
        work: requests,
        errors,
        latency_us,
        ..Measured::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRK: &str = "Running 1s test @ http://10.244.2.10:8080/\n  1 threads and 64 connections\n  \
        Thread Stats   Avg      Stdev     Max   +/- Stdev\n    Latency     1.10ms  200.00us   9.00ms   90.00%\n  \
        12345 requests in 1.00s, 2.50MB read\n  Socket errors: connect 0, read 3, write 0, timeout 1\n\
        Requests/sec:  12340.50\nTransfer/sec:      2.50MB\nPercentiles: 1050.000000 8900.000000 12000.000000\n";

    #[test]
    fn what_wrk_prints_is_understood() {
        let measured = wrk_result(WRK).unwrap();
        assert_eq!(
            (measured.value, measured.work, measured.errors),
            (12340.5, 12345.0, 4)
        );
        let latency = measured.latency_us.unwrap();
        assert_eq!((latency.p50, latency.p99), (1050.0, 8900.0));
        assert_eq!(latency.p999, Some(12_000.0));
        let few = WRK.replace("12345 requests", "999 requests");
        assert_eq!(wrk_result(&few).unwrap().latency_us.unwrap().p999, None);
        assert!(wrk_result(&WRK.replace("Percentiles", "")).is_err());
        assert!(wrk_result("unable to connect").is_err());
    }

    #[test]
    fn what_iperf3_prints_is_understood() {
        let text = r#"{"end":{"sum_received":{"bytes":125000000,"bits_per_second":1e9}}}"#;
        let measured = iperf3_result(text).unwrap();
        assert_eq!((measured.value, measured.work), (1.0, 125e6));
        assert!(
            iperf3_result(r#"{"error":"unable to connect"}"#)
                .unwrap_err()
                .to_string()
                .contains("unable to connect")
        );
    }
}
