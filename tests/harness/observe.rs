//! What the proxies say: access logs, metrics, admin pages.

use std::time::Duration;

use lab::standing::Daemon;
use serde_json::Value;

use super::{Stage, eventually};

/// How long a line of a log, written by a thread of its own, may take to appear.
const WRITTEN_WITHIN: Duration = Duration::from_secs(10);

/// A place in the log of a node's proxy.
#[derive(Debug, Clone, Copy)]
pub struct LogMark {
    node: u8,
    offset: usize,
}

impl Stage {
    /// The end of the log of a node's proxy as it is.
    pub fn mark(&self, node: u8) -> LogMark {
        let offset = self.proxy_log(node).len();
        LogMark { node, offset }
    }

    /// Everything that the proxy of a node wrote.
    pub fn proxy_log(&self, node: u8) -> String {
        let path = self.lab.log_path(node, Daemon::Proxy);
        String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
    }

    /// Lines of the access log since `mark`.
    pub fn access_lines(&self, mark: LogMark) -> Vec<Value> {
        let log = self.proxy_log(mark.node);
        let lines = log[mark.offset..].lines();
        lines
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .filter(|line| line["target"] == "access")
            .collect()
    }

    /// Waits for a line of the access log after `mark` in which every one of these keys has its value. A value that
    /// begins with `~` need only be contained.
    pub fn access_line(&self, mark: LogMark, wanted: &[(&str, &str)]) -> Value {
        let fits = |line: &Value| {
            wanted.iter().all(|(key, value)| {
                let found = line[*key].as_str().unwrap_or_default();
                match value.strip_prefix('~') {
                    Some(part) => found.contains(part),
                    None => found == *value,
                }
            })
        };
        let mut found = None;
        let what = format!("proxy{} logs {wanted:?}", mark.node);
        eventually(&what, WRITTEN_WITHIN, || {
            found = self.access_lines(mark).into_iter().find(fits);
            found.is_some()
        });
        found.unwrap()
    }

    /// A page of the proxy of a node, by its port and path.
    pub fn page(&self, node: u8, port: u16, path: &str) -> String {
        let url = format!("http://127.0.0.1:{port}{path}");
        let curl = [
            "curl",
            "--silent",
            "--show-error",
            "--fail",
            "--max-time",
            "10",
            &url,
        ];
        let done = self
            .lab
            .run(&format!("proxy{node}"), &curl, Duration::from_secs(15))
            .and_then(|done| done.success(&url));
        done.expect("the page is there").stdout
    }

    /// Sum of the values of a metric of a node's proxy over all series that have all of these labels.
    pub fn metric(&self, node: u8, name: &str, labels: &[(&str, &str)]) -> f64 {
        let page = self.page(node, 15020, "/metrics");
        let labels: Vec<String> = labels
            .iter()
            .map(|(label, value)| format!("{label}=\"{value}\""))
            .collect();
        page.lines()
            .filter(|line| {
                line.starts_with(&format!("{name}{{")) || line.starts_with(&format!("{name} "))
            })
            .filter(|line| labels.iter().all(|label| line.contains(label)))
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }
}
