//! The benchmark on real geneve, on machines whose kernel has none: the same program, run by a User-Mode Linux machine
//! that has it ([`crate::guest`]). One processor and a slow kernel: its numbers compare with each other only.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::case::Case;
use super::interrupt;
use super::report::RESULTS;
use super::variant::Variant;
use crate::guest::{self, Guest, GuestSpec};
use crate::standing::Progress;
use crate::topology::Programs;

/// The overlay that all this is for.
const GENEVE: &str = "geneve";
/// Memory of the machine: four labs with their servers touch a quarter of it.
const MEMORY: &str = "2048M";
/// What booting, a lab per variant, proofs and removal may take, and every sample beyond its seconds.
const SET_UP_WITHIN: Duration = Duration::from_secs(240);
const LAB_WITHIN: Duration = Duration::from_secs(90);
const SAMPLE_WITHIN: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Lines of the benchmark's own messages that an error quotes.
const QUOTED_LINES: usize = 20;

/// A benchmark as a user orders it.
#[derive(Debug, Clone)]
pub struct GeneveSpec {
    /// Variants.
    pub variants: Vec<Variant>,
    /// Cases.
    pub cases: Vec<Case>,
    /// Rounds.
    pub rounds: usize,
    /// Seconds of one sample.
    pub seconds: u64,
    /// The programs that are measured.
    pub programs: Programs,
    /// Where results.json goes.
    pub out: PathBuf,
}

/// What the machine brought back.
#[derive(Debug, Clone)]
pub struct GeneveReport {
    /// Tables and conditions as the benchmark printed them in the machine.
    pub printed: String,
    /// The overlay device of the node capture, as the machine's kernel named it.
    pub overlay: String,
    /// How much of each case went through it.
    pub shares: Vec<Share>,
}

/// How much of what a variant moved in a case went through the overlay, from all samples of `istioout` on the client's
/// node.
#[derive(Debug, Clone, PartialEq)]
pub struct Share {
    /// Variant.
    pub variant: String,
    /// Case.
    pub case: String,
    /// Bytes through the overlay, of all devices' headers too, per byte of payload for a bulk stream.
    pub bytes: Option<f64>,
    /// Packets through the overlay per operation, for everything else.
    pub packets_per_operation: Option<f64>,
}

impl GeneveSpec {
    fn limit(&self) -> Duration {
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let samples = count(self.variants.len() * self.cases.len() * (self.rounds + 1));
        let sample = SAMPLE_WITHIN + Duration::from_secs(self.seconds);
        let labs = LAB_WITHIN.saturating_mul(count(self.variants.len()));
        SET_UP_WITHIN
            .saturating_add(labs)
            .saturating_add(sample.saturating_mul(samples))
    }

    /// What the machine runs: both streams go to files that are followed from outside.
    fn command(&self, work: &Path) -> Vec<String> {
        let path = |name: &str| work.join(name).display().to_string();
        let list = |words: Vec<String>| words.join(",");
        let redirect = format!("exec \"$@\" > '{}' 2> '{}'", path("stdout"), path("stderr"));
        let words = [
            "sh",
            "-ec",
            &redirect,
            "sh",
            &self.programs.ambidex.display().to_string(),
            "bench",
            "--overlay",
            GENEVE,
            "--variants",
            &list(self.variants.iter().map(Variant::to_string).collect()),
            "--cases",
            &list(self.cases.iter().map(Case::to_string).collect()),
            "--rounds",
            &self.rounds.to_string(),
            "--seconds",
            &self.seconds.to_string(),
            "--out",
            &path("out"),
        ];
        words.map(str::to_owned).to_vec()
    }
}

/// Boots the machine, runs the benchmark in it, and brings results.json here, also a partial one.
///
/// # Errors
/// When the machine cannot boot, does not end in time, or gives no complete result over geneve, with the end of what was
/// said in it; [`interrupt::Interrupted`] when [`interrupt::listen`] was told to end.
pub fn run(spec: &GeneveSpec, progress: Progress<'_>) -> Result<GeneveReport> {
    guest::require()?;
    let work = WorkDirectory::below(&spec.out)?;
    let programs = spec.programs.ambidex.parent();
    let started = Instant::now();
    let mut guest = Guest::boot(&GuestSpec {
        work: &work.0,
        readable: &programs.into_iter().collect::<Vec<_>>(),
        memory: MEMORY,
        command: &spec.command(&work.0),
    })?;
    let limit = spec.limit();
    progress(&format!(
        "booting User-Mode Linux with {MEMORY}; at most {} min",
        limit.as_secs().div_ceil(60)
    ));
    let mut told = 0;
    let ended = loop {
        told = tell(&work.0.join("stderr"), told, progress);
        if let Err(interrupted) = interrupt::check() {
            drop(guest);
            keep(&work.0, &spec.out, Some(json!("interrupted")))?;
            return Err(interrupted.into());
        }
        if let Some(status) = guest.ended()? {
            break format!("ended ({status})");
        }
        if started.elapsed() > limit {
            break format!("did not end within {limit:?}");
        }
        thread::sleep(LOOK_EVERY);
    };
    tell(&work.0.join("stderr"), told, progress);
    let (code, console) = (guest.code(), guest.end_of_console());
    drop(guest);
    if code != Some(0) {
        let how = match code {
            Some(code) => format!("the benchmark in the machine failed with exit code {code}"),
            None => format!("the machine {ended} before the benchmark in it did"),
        };
        keep(&work.0, &spec.out, Some(json!({ "failed": how })))?;
        bail!(
            "{how}:\n{}\n--- end of the machine's console:\n{console}",
            last_lines(&work.0.join("stderr"))
        );
    }
    let results = keep(&work.0, &spec.out, None)?.context("the machine gave no result")?;
    Ok(GeneveReport {
        printed: printed(&work.0),
        overlay: judge(&results)?,
        shares: shares(&results),
    })
}

/// A result is one only if it is complete and over geneve, with packets in the overlay of every node capture.
fn judge(results: &Value) -> Result<String> {
    if results["ended"] != "finished" {
        bail!(
            "the benchmark in the machine did not finish: {}",
            results["ended"]
        );
    }
    let samples = results["samples"].as_array();
    if samples.is_none_or(Vec::is_empty) {
        bail!("the machine gave a result without samples");
    }
    match results["overlay"].as_str() {
        Some(GENEVE) => Ok(GENEVE.to_owned()),
        other => bail!(
            "measured over {}, not over {GENEVE}",
            other.unwrap_or("none")
        ),
    }
}

fn shares(results: &Value) -> Vec<Share> {
    let of = |key: &str| {
        let words = results[key].as_array().into_iter().flatten();
        words
            .filter_map(|word| word.as_str().map(str::to_owned))
            .collect::<Vec<_>>()
    };
    let samples = results["samples"].as_array().into_iter().flatten();
    let sum = |variant: &str, case: &str, value: fn(&Value) -> &Value| -> f64 {
        samples
            .clone()
            .filter(|sample| sample["variant"] == variant && sample["case"] == case)
            .filter_map(|sample| value(sample).as_f64())
            .sum()
    };
    let mut shares = Vec::new();
    for variant in of("variants") {
        for case in of("cases") {
            let work = sum(&variant, &case, |sample| &sample["work"]);
            let bytes = sum(&variant, &case, |sample| &sample["overlays"][0]["tx_bytes"]);
            let packets = sum(
                &variant,
                &case,
                |sample| &sample["overlays"][0]["tx_packets"],
            );
            if work <= 0.0 {
                continue;
            }
            let is_bulk = case.contains("/bulk");
            shares.push(Share {
                bytes: is_bulk.then_some(bytes / work),
                packets_per_operation: (!is_bulk).then_some(packets / work),
                variant: variant.clone(),
                case,
            });
        }
    }
    shares
}

impl fmt::Display for GeneveReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "overlay: {}", self.overlay)?;
        for share in &self.shares {
            write!(f, "  {:<12} {:<22} ", share.variant, share.case)?;
            match (share.bytes, share.packets_per_operation) {
                (Some(bytes), _) => writeln!(f, "{:.2} % of the bytes through it", bytes * 100.0)?,
                (_, Some(packets)) => writeln!(f, "{packets:.3} packets per operation through it")?,
                _ => writeln!(f)?,
            }
        }
        Ok(())
    }
}

/// Passes on whole lines that came since `told` bytes; returns how far it is now.
fn tell(path: &Path, told: usize, progress: Progress<'_>) -> usize {
    let bytes = fs::read(path).unwrap_or_default();
    let fresh = bytes.get(told..).unwrap_or_default();
    let Some(end) = fresh.iter().rposition(|byte| *byte == b'\n') else {
        return told;
    };
    for line in String::from_utf8_lossy(&fresh[..end]).lines() {
        progress(&format!("guest: {line}"));
    }
    told + end + 1
}

/// What the benchmark printed in the machine, without the place of a file that is somewhere else by then.
fn printed(work: &Path) -> String {
    let text = fs::read_to_string(work.join("stdout")).unwrap_or_default();
    let place = work.display().to_string();
    let lines = text.lines().filter(|line| !line.contains(&place));
    lines.map(|line| format!("{line}\n")).collect()
}

fn last_lines(path: &Path) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(QUOTED_LINES)..].join("\n")
}

/// Brings results.json from the machine's directory, if there is one; `ended` is how it ended if the benchmark there
/// could not say so itself.
fn keep(work: &Path, out: &Path, ended: Option<Value>) -> Result<Option<Value>> {
    let Ok(text) = fs::read(work.join("out").join(RESULTS)) else {
        return Ok(None);
    };
    let mut results: Value = serde_json::from_slice(&text).context("the machine's results.json")?;
    if let Some(ended) = ended
        && results["ended"] == "running"
    {
        results["ended"] = ended;
    }
    let path = out.join(RESULTS);
    let temporary = path.with_extension("json.tmp");
    fs::write(&temporary, serde_json::to_vec_pretty(&results)?)
        .and_then(|()| fs::rename(&temporary, &path))
        .with_context(|| format!("write {}", path.display()))?;
    Ok(Some(results))
}

/// The directory that the machine writes to; removed with everything in it.
struct WorkDirectory(PathBuf);

impl WorkDirectory {
    fn below(out: &Path) -> Result<Self> {
        let failed = || format!("create {}", out.display());
        fs::create_dir_all(out).with_context(failed)?;
        let path = out
            .canonicalize()
            .with_context(failed)?
            .join(format!(".guest-{}", std::process::id()));
        fs::create_dir_all(path.join("out")).with_context(|| path.display().to_string())?;
        Ok(Self(path))
    }
}

impl Drop for WorkDirectory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("{}: {error}", self.0.display());
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn results(overlay: &str) -> Value {
        let sample = |variant: &str, case: &str, work: u64, bytes: u64, packets: u64| {
            json!({"variant": variant, "case": case, "work": work,
                   "overlays": [{"tx_bytes": bytes, "tx_packets": packets}, {}]})
        };
        json!({
            "ended": "finished",
            "overlay": overlay,
            "variants": ["node-hybrid", "node-tunnel"],
            "cases": ["cross-node/bulk1", "cross-node/newconn"],
            "samples": [
                sample("node-tunnel", "cross-node/bulk1", 1000, 1100, 3),
                sample("node-tunnel", "cross-node/bulk1", 1000, 1100, 3),
                sample("node-hybrid", "cross-node/bulk1", 1000, 1, 1),
                sample("node-hybrid", "cross-node/newconn", 100, 6000, 100),
            ],
        })
    }

    #[test]
    fn shares_come_from_all_samples() {
        let shares = shares(&results(GENEVE));
        let found: Vec<_> = shares
            .iter()
            .map(|share| {
                (
                    share.variant.as_str(),
                    share.bytes,
                    share.packets_per_operation,
                )
            })
            .collect();
        assert_eq!(
            found,
            [
                ("node-hybrid", Some(0.001), None),
                ("node-hybrid", None, Some(1.0)),
                ("node-tunnel", Some(1.1), None),
            ]
        );
    }

    #[test]
    fn only_a_complete_result_over_geneve_is_one() {
        assert_eq!(judge(&results(GENEVE)).unwrap(), GENEVE);
        let error = judge(&results("vxlan")).unwrap_err().to_string();
        assert!(error.contains("over vxlan"), "{error}");
        let mut running = results(GENEVE);
        running["ended"] = json!("running");
        assert!(judge(&running).is_err());
        let mut empty = results(GENEVE);
        empty["samples"] = json!([]);
        assert!(judge(&empty).is_err());
    }

    #[test]
    fn a_partial_result_is_kept_and_says_so() {
        let directory = tempfile::tempdir().unwrap();
        let (work, out) = (directory.path().join("work"), directory.path().join("out"));
        fs::create_dir_all(work.join("out")).unwrap();
        fs::create_dir_all(&out).unwrap();
        assert!(keep(&work, &out, None).unwrap().is_none());
        fs::write(
            work.join("out").join(RESULTS),
            r#"{"ended":"running","samples":[1]}"#,
        )
        .unwrap();
        keep(&work, &out, Some(json!("interrupted"))).unwrap();
        let kept: Value = serde_json::from_slice(&fs::read(out.join(RESULTS)).unwrap()).unwrap();
        assert_eq!(kept, json!({"ended": "interrupted", "samples": [1]}));
    }
}
