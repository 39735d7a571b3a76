//! Taking out what nobody else may know.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// What stands where a secret was.
pub const REDACTED: &str = "[redacted]";
/// Shorter values are too likely to be words that stand elsewhere by chance.
const SHORTEST: usize = 8;
/// A line of the body of a PEM text has 64 characters, the last one fewer.
const SHORTEST_KEY_LINE: usize = 20;
/// Largest file that is looked at for a secret.
const LARGEST: u64 = 1 << 20;
/// Where Kubernetes puts tokens of ours and of the service account.
const TOKEN_FILES: [&str; 2] = [
    "/var/run/secrets/tokens/istio-token",
    "/var/run/secrets/kubernetes.io/serviceaccount/token",
];
/// Parts of the names of variables and flags that hold secrets.
const SECRET_NAMES: [&str; 5] = ["token", "secret", "password", "authorization", "_header_"];

/// Beginnings of the lines of a TLS key log (`SSLKEYLOGFILE`).
const KEY_LOG_LINES: [&str; 7] = [
    "CLIENT_RANDOM ",
    "CLIENT_EARLY_TRAFFIC_SECRET ",
    "CLIENT_HANDSHAKE_TRAFFIC_SECRET ",
    "SERVER_HANDSHAKE_TRAFFIC_SECRET ",
    "CLIENT_TRAFFIC_SECRET_0 ",
    "SERVER_TRAFFIC_SECRET_0 ",
    "EXPORTER_SECRET ",
];

/// Secrets of this node, and the forms that secrets of others have.
#[derive(Debug, Default)]
pub struct Secrets {
    /// Known ones, the longest first, so that none hides a part of another.
    known: Vec<String>,
}

impl Secrets {
    /// Those that can be found here: private keys of the built-in CA, tokens in their usual files and in the environment.
    pub fn of_node(ca_dir: &Path) -> Self {
        let mut known = BTreeSet::new();
        let entries = fs::read_dir(ca_dir).into_iter().flatten();
        for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
            if let Some(text) = small_text(&path) {
                known.extend(key_lines(&text));
            }
        }
        let tokens = TOKEN_FILES
            .iter()
            .filter_map(|path| small_text(Path::new(path)));
        known.extend(tokens);
        for (name, value) in std::env::vars() {
            if is_secret_name(&name) {
                known.extend(small_text(Path::new(&value)));
                known.insert(value);
            }
        }
        Self::new(known)
    }

    /// These.
    pub fn new(known: impl IntoIterator<Item = String>) -> Self {
        let trimmed = known.into_iter().map(|secret| secret.trim().to_owned());
        let mut known: Vec<String> = trimmed
            .filter(|secret| secret.len() >= SHORTEST && !secret.starts_with('/'))
            .collect();
        known.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        known.dedup();
        Self { known }
    }

    /// The text without secrets.
    pub fn redact(&self, text: &str) -> String {
        let mut text = without_keys(text);
        for secret in &self.known {
            if text.contains(secret.as_str()) {
                text = text.replace(secret.as_str(), REDACTED);
            }
        }
        let text = without_web_tokens(&text);
        without_named(&text)
    }
}

fn small_text(path: &Path) -> Option<String> {
    let metadata = fs::metadata(path).ok()?;
    if !metadata.is_file() || metadata.len() > LARGEST {
        return None;
    }
    fs::read_to_string(path).ok()
}

/// The lines of the bodies of private keys: found in whatever the key is wrapped in.
fn key_lines(pem: &str) -> Vec<String> {
    let mut lines = Vec::new();
    let mut inside = false;
    for line in pem.lines().map(str::trim) {
        if line.starts_with("-----") {
            inside = line.starts_with("-----BEGIN") && line.contains("PRIVATE KEY");
        } else if inside && line.len() >= SHORTEST_KEY_LINE {
            lines.push(line.to_owned());
        }
    }
    lines
}

/// Blocks of private keys, also with their line ends escaped as in JSON. One that does not end is taken out to the end.
fn without_keys(text: &str) -> String {
    let (begin, end) = ("-----BEGIN ", "-----END ");
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(begin) {
        let block = &rest[at..];
        let label = block[begin.len()..]
            .split("-----")
            .next()
            .unwrap_or_default();
        if !label.contains("PRIVATE KEY") || label.len() > 40 {
            out.push_str(&rest[..at + begin.len()]);
            rest = &block[begin.len()..];
            continue;
        }
        out.push_str(&rest[..at]);
        out.push_str(REDACTED);
        let after = block.find(end).map(|at| &block[at + end.len()..]);
        let label_end = after.and_then(|after| Some((after, after.find("-----")?)));
        rest = label_end.map_or("", |(after, at)| &after[at + 5..]);
    }
    out.push_str(rest);
    out
}

fn of_token(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '~' | '+' | '/' | '=')
}

/// JSON web tokens: three parts in base64, of which the first two begin as an object does.
fn without_web_tokens(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("eyJ") {
        let length = rest[at..].find(|c| !of_token(c)).unwrap_or(rest.len() - at);
        let word = &rest[at..at + length];
        let is_token = word
            .split('.')
            .nth(1)
            .is_some_and(|payload| payload.starts_with("eyJ"));
        out.push_str(&rest[..at]);
        out.push_str(if is_token { REDACTED } else { word });
        rest = &rest[at + length..];
    }
    out.push_str(rest);
    out
}

/// What follows `Bearer`, lines of a TLS key log, and values of what has a name that says what they are.
fn without_named(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        let lower = line.to_ascii_lowercase();
        if KEY_LOG_LINES.iter().any(|label| line.starts_with(label)) {
            out.push_str(REDACTED);
            out.push('\n');
        } else if lower.contains("bearer ") {
            out.push_str(&without_values(&without_bearer(line, &lower)));
        } else {
            out.push_str(&without_values(line));
        }
    }
    out
}

/// Values behind `=` or `:`. Without quotation marks only long ones, because a word may follow a colon in any sentence.
fn without_values(line: &str) -> String {
    let lower = line.to_ascii_lowercase();
    if !SECRET_NAMES.iter().any(|part| lower.contains(part)) {
        return line.to_owned();
    }
    let of_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    let mut out = String::with_capacity(line.len());
    let mut rest = line;
    while let Some(at) = rest.find(of_name) {
        let length = rest[at..].find(|c| !of_name(c)).unwrap_or(rest.len() - at);
        let name = &rest[at..at + length];
        out.push_str(&rest[..at + length]);
        rest = &rest[at + length..];
        if !is_secret_name(name) {
            continue;
        }
        // `"name" : "value`, and the same with its marks escaped.
        let skipped = rest.len() - rest.trim_start_matches(['\\', '"', ' ']).len();
        let Some(behind) = rest[skipped..].strip_prefix(['=', ':']) else {
            continue;
        };
        let value = behind.trim_start_matches(['\\', '"', ' ']);
        let opening = &behind[..behind.len() - value.len()];
        let (end, shortest): (fn(char) -> bool, usize) = match opening.contains('"') {
            true => (|c| matches!(c, '"' | '\\' | '\n'), SHORTEST),
            false => (
                |c| c.is_whitespace() || matches!(c, ',' | ';' | '&' | '}' | ']' | '"'),
                2 * SHORTEST,
            ),
        };
        let length = value.find(end).unwrap_or(value.len());
        // A path is where a secret is, and no secret.
        if length >= shortest && !value.starts_with('/') && !value.starts_with(REDACTED) {
            out.push_str(&rest[..rest.len() - value.len()]);
            out.push_str(REDACTED);
            rest = &value[length..];
        }
    }
    out.push_str(rest);
    out
}

fn without_bearer(line: &str, lower: &str) -> String {
    let scheme = "bearer ";
    let mut out = String::with_capacity(line.len());
    let mut from = 0;
    while let Some(at) = lower[from..].find(scheme) {
        let start = from + at + scheme.len();
        let length = line[start..]
            .find(|c| !of_token(c))
            .unwrap_or(line.len() - start);
        out.push_str(&line[from..start]);
        // A word of a sentence is no credential.
        let word = &line[start..start + length];
        out.push_str(if length >= SHORTEST { REDACTED } else { word });
        from = start + length;
    }
    out.push_str(&line[from..]);
    out
}

/// Whether a variable or flag of this name holds a secret.
pub(super) fn is_secret_name(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    SECRET_NAMES.iter().any(|part| name.contains(part))
}

/// A command line without the values of flags that hold secrets.
pub(super) fn command_line(arguments: &[String]) -> String {
    let mut shown = Vec::with_capacity(arguments.len());
    let mut secret_next = false;
    for argument in arguments {
        let (name, value) = match argument.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (argument.as_str(), None),
        };
        let is_flag = argument.starts_with('-');
        shown.push(match value {
            _ if secret_next && !is_flag => REDACTED.to_owned(),
            Some(value) if is_flag && is_secret_name(name) && !value.is_empty() => {
                format!("{name}={REDACTED}")
            }
            _ => argument.clone(),
        });
        secret_next = is_flag && value.is_none() && is_secret_name(name);
    }
    shown.join(" ")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const BODY: &str = "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgVcB/UNPxalR9zDYA";

    #[test]
    fn keys_are_taken_out_in_every_wrapping() {
        let pem = format!("-----BEGIN PRIVATE KEY-----\n{BODY}\nrest\n-----END PRIVATE KEY-----\n");
        let certificate = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        let none = Secrets::default();
        let text = format!("before {certificate}{pem}after");
        assert_eq!(
            none.redact(&text),
            format!("before {certificate}{REDACTED}\nafter")
        );
        let json = serde_json::json!({ "key": pem, "other": 1 }).to_string();
        assert_eq!(
            none.redact(&json),
            format!("{{\"key\":\"{REDACTED}\\n\",\"other\":1}}")
        );
        let cut = format!("before -----BEGIN EC PRIVATE KEY-----\n{BODY}");
        assert_eq!(none.redact(&cut), format!("before {REDACTED}"));
    }

    #[test]
    fn what_is_known_is_taken_out_wherever_it_stands() {
        let directory = tempfile::tempdir().unwrap();
        let pem = format!("-----BEGIN PRIVATE KEY-----\n{BODY}\n-----END PRIVATE KEY-----\n");
        fs::write(directory.path().join("root-key.pem"), pem).unwrap();
        let secrets = Secrets::of_node(directory.path());
        assert_eq!(
            secrets.redact(&format!("key={BODY};")),
            format!("key={REDACTED};")
        );
        let secrets = Secrets::new([
            "hunter2hunter2".to_owned(),
            "short".to_owned(),
            "/var/run/token".to_owned(),
        ]);
        assert_eq!(
            secrets.redact("a hunter2hunter2 short /var/run/token"),
            format!("a {REDACTED} short /var/run/token")
        );
    }

    #[test]
    fn tokens_are_taken_out() {
        let none = Secrets::default();
        let token = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhZ2VudCJ9.c2lnbmF0dXJl-_x";
        assert_eq!(
            none.redact(&format!("token {token}, next")),
            format!("token {REDACTED}, next")
        );
        assert_eq!(
            none.redact("Authorization: Bearer abcDEF123.x\n"),
            format!("Authorization: Bearer {REDACTED}\n")
        );
        assert_eq!(
            none.redact("authorization: bearer abcDEF123"),
            format!("authorization: bearer {REDACTED}")
        );
        // Neither a token nor a credential.
        for text in [
            "eyJ is how objects begin",
            "the bearer of it",
            "eyJhIjoxfQ.file",
        ] {
            assert_eq!(none.redact(text), text);
        }
    }

    #[test]
    fn values_with_a_telling_name_are_taken_out() {
        let none = Secrets::default();
        for (text, redacted) in [
            (
                r#"{"k8s_auth_token": "0123456789abcdef", "a": "b"}"#,
                r#"{"k8s_auth_token": "[redacted]", "a": "b"}"#,
            ),
            (
                r#"{"line": "{\"password\":\"hunter2hunter2\"}"}"#,
                r#"{"line": "{\"password\":\"[redacted]\"}"}"#,
            ),
            (
                "AUTH_TOKEN=0123456789abcdef next\n",
                "AUTH_TOKEN=[redacted] next\n",
            ),
            (
                "client-secret: 0123456789abcdef",
                "client-secret: [redacted]",
            ),
            (
                "CLIENT_TRAFFIC_SECRET_0 00 00\nEXPORTER_SECRET 00 00\nnext\n",
                "[redacted]\n[redacted]\nnext\n",
            ),
        ] {
            assert_eq!(none.redact(text), redacted);
        }
        for text in [
            "token: expired",
            r#"{"tokenFile": "/var/run/secrets/tokens/istio-token"}"#,
            "requests_with_token_total{code=\"200\"} 12345678901234567890",
        ] {
            assert_eq!(none.redact(text), text);
        }
    }

    #[test]
    fn command_lines_keep_all_but_secrets() {
        let line =
            |text: &str| command_line(&text.split(' ').map(str::to_owned).collect::<Vec<_>>());
        assert_eq!(
            line(
                "ambidex proxy --auth-token s3cr3t --xds-address a:1 --auth-token=s3cr3t --node n"
            ),
            format!(
                "ambidex proxy --auth-token {REDACTED} --xds-address a:1 --auth-token={REDACTED} --node n"
            )
        );
    }
}
