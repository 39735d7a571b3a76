//! Proxies of others that speak ZDS, measured in the same lab.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;

use super::variant::Variant;

/// A program that takes the place of `ambidex proxy` in the lab of the in-pod capture.
#[derive(Debug, Clone)]
pub struct ExternalProxy {
    /// What it is called in results.
    pub name: String,
    /// The program. It is started with one argument, `proxy`, as the deployments of proxies of this kind do, and told
    /// everything else by its environment.
    pub program: PathBuf,
    /// What its environment has on top of what the lab gives it.
    pub environment: BTreeMap<String, String>,
}

impl ExternalProxy {
    /// Program and argument.
    pub fn command(&self) -> Vec<String> {
        vec![self.program.display().to_string(), "proxy".to_owned()]
    }

    /// What the lab's environment of a proxy (socket of the agent, workloads, name of the node) lacks for a proxy that
    /// expects a control plane: that there is none, certificates of its own, and as many threads as `ambidex proxy` has.
    /// What the user gave wins.
    pub fn full_environment(&self) -> BTreeMap<String, String> {
        let threads = std::thread::available_parallelism().map_or(2, |count| count.get().max(2));
        let threads = threads.to_string();
        let given = [
            ("PROXY_MODE", "shared"),
            ("XDS_ADDRESS", ""),
            ("CA_ADDRESS", ""),
            ("FAKE_CA", "true"),
            ("CLUSTER_ID", "Kubernetes"),
            ("TRUST_DOMAIN", "cluster.local"),
            ("POD_NAMESPACE", "istio-system"),
            ("SERVICE_ACCOUNT", "ztunnel"),
            ("ZTUNNEL_WORKER_THREADS", threads.as_str()),
            ("RUST_LOG", "info"),
        ];
        let mut environment: BTreeMap<String, String> = given
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into();
        environment.extend(self.environment.clone());
        environment
    }

    /// One of which only the name is known: in results that were read, not in a benchmark to be made.
    pub fn named(name: String) -> Self {
        Self {
            name,
            program: PathBuf::new(),
            environment: BTreeMap::new(),
        }
    }
}

/// Results know a proxy by its name.
impl PartialEq for ExternalProxy {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for ExternalProxy {}

impl FromStr for ExternalProxy {
    type Err = String;

    /// `name=PATH[,KEY=VALUE…]`.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| format!("{text:?}: {why}: want name=PATH[,KEY=VALUE…]");
        let mut parts = text.split(',');
        let (name, program) = parts
            .next()
            .and_then(|first| first.split_once('='))
            .ok_or_else(|| wrong("no name and path"))?;
        let regular = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if name.is_empty() || !name.bytes().all(regular) {
            return Err(wrong("a name has a-z, 0-9 and -"));
        }
        if name.parse::<Variant>().is_ok() {
            return Err(wrong("there is a variant of this name"));
        }
        if program.is_empty() {
            return Err(wrong("no path"));
        }
        let environment = parts.map(|part| match part.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
            _ => Err(wrong(&format!("{part:?} is no variable"))),
        });
        Ok(Self {
            name: name.to_owned(),
            program: program.into(),
            environment: environment.collect::<Result<_, _>>()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_is_a_name_a_path_and_variables() {
        let proxy: ExternalProxy = "field=/opt/x,RUST_LOG=warn,FAKE_CA=true".parse().unwrap();
        assert_eq!(
            (proxy.name.as_str(), proxy.program.to_str()),
            ("field", Some("/opt/x"))
        );
        let expected = [("FAKE_CA", "true"), ("RUST_LOG", "warn")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()));
        assert_eq!(proxy.environment, BTreeMap::from(expected));
        let full = proxy.full_environment();
        assert_eq!(full["RUST_LOG"], "warn", "the user's wins");
        assert_eq!(full["XDS_ADDRESS"], "");
        for wrong in [
            "",
            "field",
            "=x",
            "A=x",
            "field=",
            "field=x,y",
            "inpod=x",
            "f=x,=y",
        ] {
            let error = wrong.parse::<ExternalProxy>().unwrap_err();
            assert!(error.contains("name=PATH"), "{error}");
        }
    }
}
