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
    /// The program. It is started without arguments: proxies of this kind are told everything by their environment.
    pub program: PathBuf,
    /// What its environment has on top of what the lab gives it.
    pub environment: BTreeMap<String, String>,
}

impl ExternalProxy {
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
