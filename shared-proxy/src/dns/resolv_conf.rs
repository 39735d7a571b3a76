//! The part of `resolv.conf`(5) that a forwarder needs.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Port of a resolver (RFC 1035).
const DOMAIN_PORT: u16 = 53;
/// The C library asks no more than this many resolvers.
const MOST_RESOLVERS: usize = 3;
/// Limits of the C library for `timeout` and `attempts`.
const LONGEST_TIMEOUT: u64 = 30;
const MOST_ATTEMPTS: u32 = 5;

/// Resolvers and how they are asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvConf {
    /// Resolvers, the first one asked first.
    pub nameservers: Vec<SocketAddr>,
    /// How long one may take.
    pub timeout: Duration,
    /// Rounds through all of them.
    pub attempts: u32,
}

/// A file that gives no resolvers.
#[derive(Debug, thiserror::Error)]
pub enum ResolvConfError {
    /// It cannot be read.
    #[error("resolvers: {path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// No usable `nameserver` line.
    #[error("resolvers: {0} names no nameserver")]
    Empty(PathBuf),
}

impl ResolvConf {
    /// Reads a file.
    pub fn load(path: &Path) -> Result<Self, ResolvConfError> {
        let text = std::fs::read_to_string(path).map_err(|source| ResolvConfError::Read {
            path: path.to_owned(),
            source,
        })?;
        let conf = Self::parse(&text);
        if conf.nameservers.is_empty() {
            return Err(ResolvConfError::Empty(path.to_owned()));
        }
        Ok(conf)
    }

    /// Reads a text. As the C library does: what is not understood is passed over.
    pub fn parse(text: &str) -> Self {
        let mut conf = Self {
            nameservers: Vec::new(),
            timeout: Duration::from_secs(5),
            attempts: 2,
        };
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") if conf.nameservers.len() < MOST_RESOLVERS => {
                    let address = words.next().and_then(|word| word.parse::<IpAddr>().ok());
                    conf.nameservers
                        .extend(address.map(|ip| SocketAddr::new(ip, DOMAIN_PORT)));
                }
                Some("options") => words.for_each(|option| conf.option(option)),
                _ => {}
            }
        }
        conf
    }

    fn option(&mut self, option: &str) {
        match option.split_once(':') {
            Some(("timeout", seconds)) => {
                if let Ok(seconds) = seconds.parse::<u64>() {
                    self.timeout = Duration::from_secs(seconds.clamp(1, LONGEST_TIMEOUT));
                }
            }
            Some(("attempts", attempts)) => {
                if let Ok(attempts) = attempts.parse::<u32>() {
                    self.attempts = attempts.clamp(1, MOST_ATTEMPTS);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn what_a_pods_file_says() {
        let conf = ResolvConf::parse(
            "# written by the kubelet\nsearch default.svc.cluster.local svc.cluster.local\n\
             nameserver 10.96.0.10\nnameserver fd00::a\noptions ndots:5 timeout:2 attempts:9 edns0\nnameserver nonsense\n",
        );
        assert_eq!(
            conf.nameservers,
            ["10.96.0.10:53", "[fd00::a]:53"].map(|text| text.parse().unwrap())
        );
        assert_eq!(conf.timeout, Duration::from_secs(2));
        assert_eq!(conf.attempts, 5);
    }

    #[test]
    fn without_a_resolver_it_is_refused_by_name() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = ResolvConf::load(file.path()).unwrap_err().to_string();
        assert!(error.contains("names no nameserver"), "{error}");
        let error = ResolvConf::load(Path::new("/nonexistent")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent"), "{error}");
    }
}
