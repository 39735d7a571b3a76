//! How far the capture of one pod reaches: what its annotations take out of it, and what they add.

use serde::{Deserialize, Serialize};

/// Annotation: with a true value, what comes in is not captured. For gateways, which the field calls ingress mode.
pub const BYPASS_INBOUND: &str = "ambient.istio.io/bypass-inbound-capture";
/// Annotation: names of interfaces in the pod, separated by commas, behind which its own guests are: containers or virtual
/// machines that run inside the pod. What arrives there is captured as what the pod sends.
pub const VIRTUAL_INTERFACES: &str = "istio.io/reroute-virtual-interfaces";

/// Most bytes of an interface's name (`IFNAMSIZ` without its end, linux/if.h).
const NAME_LIMIT: usize = 15;
/// Most interfaces of one pod: each has a rule in five chains.
const INTERFACE_LIMIT: usize = 16;

/// Of one pod. The default is the capture of all other pods: both directions, and no guests.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Extent {
    /// What comes in is not captured, but for tunnels.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub bypass_inbound: bool,
    /// Interfaces of the pod with guests behind them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub virtual_interfaces: Vec<String>,
}

/// An extent that no rules can be made of.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExtentError {
    /// Not the name of an interface that guests can be behind.
    #[error(
        "{VIRTUAL_INTERFACES}: {0:?} is not the name of an interface in the pod: want 1 to {NAME_LIMIT} of the characters \
         A-Z a-z 0-9 . _ @ -, and not lo"
    )]
    Name(String),
    /// Too many.
    #[error("{VIRTUAL_INTERFACES}: {0} interfaces: want at most {INTERFACE_LIMIT}")]
    Number(usize),
}

impl Extent {
    /// From the values of both annotations; `bypass_inbound` is read already.
    pub fn of(bypass_inbound: Option<bool>, virtual_interfaces: Option<&str>) -> Self {
        let mut names: Vec<String> = Vec::new();
        let given = virtual_interfaces.unwrap_or_default().split(',');
        for name in given.map(str::trim).filter(|name| !name.is_empty()) {
            if !names.iter().any(|known| known == name) {
                names.push(name.to_owned());
            }
        }
        Self {
            bypass_inbound: bypass_inbound.unwrap_or_default(),
            virtual_interfaces: names,
        }
    }

    /// Whether the pod is captured as all others.
    pub fn is_usual(&self) -> bool {
        *self == Self::default()
    }

    /// Whether the pod has guests.
    pub fn has_guests(&self) -> bool {
        !self.virtual_interfaces.is_empty()
    }

    /// # Errors
    /// A name that would be something else in a rule, or that takes in what is not a guest's.
    pub fn check(&self) -> Result<(), ExtentError> {
        if self.virtual_interfaces.len() > INTERFACE_LIMIT {
            return Err(ExtentError::Number(self.virtual_interfaces.len()));
        }
        let fits = |name: &str| {
            let characters =
                |byte: u8| byte.is_ascii_alphanumeric() || [b'.', b'_', b'@', b'-'].contains(&byte);
            (1..=NAME_LIMIT).contains(&name.len())
                && name.bytes().all(characters)
                && !name.starts_with('-')
                && ![".", "..", "lo"].contains(&name)
        };
        match self.virtual_interfaces.iter().find(|name| !fits(name)) {
            Some(name) => Err(ExtentError::Name(name.clone())),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;

    #[test]
    fn annotations_are_read() {
        assert!(Extent::of(None, None).is_usual());
        assert!(Extent::of(Some(false), Some(" , ")).is_usual());
        let both = Extent::of(Some(true), Some(" virbr0,docker0 ,virbr0"));
        assert!(both.bypass_inbound);
        assert_eq!(both.virtual_interfaces, ["virbr0", "docker0"]);
        both.check().unwrap();
    }

    #[test]
    fn no_name_is_more_than_one() {
        for name in [
            "lo",
            "..",
            "-j",
            "br+",
            "br*",
            "a b",
            "a\nb",
            "a\"b",
            "a/b",
            "sixteen-long-16-",
        ] {
            let extent = Extent {
                virtual_interfaces: vec![name.to_owned()],
                ..Extent::default()
            };
            let error = extent.check().unwrap_err().to_string();
            assert!(error.contains(VIRTUAL_INTERFACES), "{name}: {error}");
        }
        let many = (0..17).map(|n| format!("v{n}")).collect();
        let many = Extent {
            virtual_interfaces: many,
            ..Extent::default()
        };
        assert_eq!(many.check(), Err(ExtentError::Number(17)));
    }
}
