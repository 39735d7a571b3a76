//! Flags that say where a proxy's mesh and certificates come from. The environment variables are the field's.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use clap::builder::BoolishValueParser;
use control_plane::ads::NodeInfo;
use control_plane::transport::{Address, Endpoint, Keepalive, Roots, Token};

use crate::proxy::sources::{AuthoritySource, Followed, MeshSource};

/// The field's control plane, when nothing else is said: in a cluster, and elsewhere.
const DEFAULT_ADDRESS: &str = "istiod.istio-system.svc:15012";
const DEFAULT_ADDRESS_ELSEWHERE: &str = "localhost:15012";
/// Set by Kubernetes in every container.
const IN_CLUSTER: &str = "KUBERNETES_SERVICE_HOST";
/// Where the field mounts the control plane's root.
const DEFAULT_ROOTS: &str = "/var/run/secrets/istio/root-cert.pem";
/// Where the field mounts the token.
const DEFAULT_TOKEN: &str = "/var/run/secrets/tokens/istio-token";
/// Stands for the roots of the operating system.
const SYSTEM: &str = "SYSTEM";
/// What a PEM text has in it and the path of a file has not.
const PEM: &str = "-----BEGIN";

#[derive(Debug, Args)]
pub(crate) struct SourceArgs {
    /// File with workloads, services and policies in LOCAL_XDS form; reloaded when it changes. With it no control plane is
    /// asked for the mesh, and the CA is the built-in one unless --ca-address says otherwise
    #[arg(long, env = "LOCAL_XDS_PATH", value_name = "FILE", value_parser = path)]
    local_xds: Option<PathBuf>,
    /// The same as a text, in place of a file
    #[arg(long, env = "LOCAL_XDS", value_name = "YAML")]
    local_xds_inline: Option<String>,
    /// Control plane that the mesh comes from: host:port, https:// before it or not; http:// means without TLS (default:
    /// istiod.istio-system.svc:15012 in a cluster, localhost:15012 elsewhere)
    #[arg(long, env = "XDS_ADDRESS", value_name = "ADDRESS")]
    xds_address: Option<String>,
    /// Roots that vouch for the control plane: a file, PEM text, or SYSTEM for those of the operating system
    #[arg(long, env = "XDS_ROOT_CA", value_name = "FILE", default_value = DEFAULT_ROOTS)]
    xds_root_ca: String,
    /// The control plane's name in its certificate, if it is another than in its address
    #[arg(long, env = "ALT_XDS_HOSTNAME", value_name = "NAME")]
    xds_hostname: Option<String>,
    /// Follow only the workloads and services that connections need
    #[arg(long, env = "XDS_ON_DEMAND", num_args = 0..=1, default_value = "false", default_missing_value = "true", value_parser = BoolishValueParser::new())]
    xds_on_demand: bool,
    /// CA that certificates come from (default: the control plane); empty for the built-in one
    #[arg(long, env = "CA_ADDRESS", value_name = "ADDRESS")]
    ca_address: Option<String>,
    /// Roots that vouch for the CA's server: a file, PEM text, or SYSTEM for those of the operating system
    #[arg(long, env = "CA_ROOT_CA", value_name = "FILE", default_value = DEFAULT_ROOTS)]
    ca_root_ca: String,
    /// The CA's name in its server's certificate, if it is another than in its address
    #[arg(long, env = "ALT_CA_HOSTNAME", value_name = "NAME")]
    ca_hostname: Option<String>,
    /// Use the built-in CA
    #[arg(long, env = "FAKE_CA", num_args = 0..=1, default_value = "false", default_missing_value = "true", value_parser = BoolishValueParser::new())]
    fake_ca: bool,
    /// Directory of the built-in CA; made when it is absent, shared by the proxies of a mesh
    #[arg(
        long,
        env = "AMBIDEX_CA_DIR",
        value_name = "DIR",
        default_value = "/var/lib/ambidex/ca"
    )]
    ca_dir: PathBuf,
    /// Token for control plane and CA: a file, or the token itself; empty for none (default:
    /// /var/run/secrets/tokens/istio-token, if it is there)
    #[arg(long, env = "AUTH_TOKEN", value_name = "FILE", hide_env_values = true)]
    auth_token: Option<String>,
    /// Name of this node, told to the control plane
    #[arg(long, env = "NODE_NAME", default_value = "")]
    node_name: String,
    /// Name of this pod, told to the control plane
    #[arg(long, env = "POD_NAME", default_value = "")]
    pod_name: String,
    /// Namespace of this pod, told to the control plane
    #[arg(long, env = "POD_NAMESPACE", default_value = "")]
    pod_namespace: String,
    /// Address of this pod, told to the control plane
    #[arg(long, env = "INSTANCE_IP", default_value = "")]
    instance_ip: String,
}

impl SourceArgs {
    pub(crate) fn sources(self, cluster_id: &str) -> anyhow::Result<(MeshSource, AuthoritySource)> {
        let said = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        let local = match (
            self.local_xds.filter(|path| !path.as_os_str().is_empty()),
            said(&self.local_xds_inline),
        ) {
            (Some(_), Some(_)) => {
                bail!(
                    "the mesh comes from a file (LOCAL_XDS_PATH) or a text (LOCAL_XDS), not from both"
                )
            }
            (Some(path), None) => Some(MeshSource::File(path)),
            (None, Some(text)) => Some(MeshSource::Text(text)),
            (None, None) => None,
        };
        let token = match self.auth_token {
            Some(text) => token(text),
            None => Some(PathBuf::from(DEFAULT_TOKEN))
                .filter(|path| path.exists())
                .map(Token::File),
        };
        let endpoint = |address: &str, roots: &str, name: &Option<String>, headers: &str| {
            anyhow::Ok(Endpoint {
                address: address.parse::<Address>()?,
                roots: match roots {
                    SYSTEM => Roots::System,
                    text if text.contains(PEM) => Roots::Text(text.to_owned()),
                    path => Roots::File(path.into()),
                },
                server_name: said(name),
                token: token.clone(),
                cluster_id: cluster_id.to_owned(),
                headers: headers_from(std::env::vars(), headers),
                keepalive: Keepalive::default(),
            })
        };
        // Said to be empty is not the same as not said.
        let xds_address = self.xds_address.unwrap_or_else(|| {
            let in_cluster = std::env::var_os(IN_CLUSTER).is_some();
            let default = if in_cluster {
                DEFAULT_ADDRESS
            } else {
                DEFAULT_ADDRESS_ELSEWHERE
            };
            default.to_owned()
        });
        let ca_address = match (&self.ca_address, &local) {
            (Some(address), _) => address.clone(),
            (None, Some(_)) => String::new(),
            (None, None) => xds_address.clone(),
        };
        let mesh = match local {
            Some(local) => local,
            None if xds_address.is_empty() => {
                bail!(
                    "nothing says where the mesh comes from: give --local-xds FILE or --xds-address ADDRESS"
                )
            }
            None => MeshSource::ControlPlane(Box::new(Followed {
                endpoint: endpoint(
                    &xds_address,
                    &self.xds_root_ca,
                    &self.xds_hostname,
                    "XDS_HEADER_",
                )
                .context("XDS_ADDRESS")?,
                node: NodeInfo {
                    pod_name: self.pod_name,
                    pod_namespace: self.pod_namespace,
                    instance_ip: self.instance_ip,
                    node_name: self.node_name,
                    metadata: metadata_from(std::env::vars()),
                },
                on_demand: self.xds_on_demand,
            })),
        };
        let authority = if self.fake_ca || ca_address.is_empty() {
            AuthoritySource::BuiltIn(self.ca_dir)
        } else {
            AuthoritySource::Remote(
                endpoint(
                    &ca_address,
                    &self.ca_root_ca,
                    &self.ca_hostname,
                    "CA_HEADER_",
                )
                .context("CA_ADDRESS")?,
            )
        };
        Ok((mesh, authority))
    }
}

/// A token given as a file or as itself. What looks like a path is one even if there is no such file: it may be mounted
/// later, and a path is no secret to send to somebody.
fn token(text: String) -> Option<Token> {
    let path = Path::new(&text);
    if text.is_empty() {
        None
    } else if path.exists() || text.contains('/') {
        Some(Token::File(path.to_owned()))
    } else {
        Some(Token::Text(text))
    }
}

/// The environment's `PREFIX_NAME=value` as headers `name: value`.
fn headers_from(
    environment: impl Iterator<Item = (String, String)>,
    prefix: &str,
) -> Vec<(String, String)> {
    environment
        .filter_map(|(name, value)| {
            let name = name.strip_prefix(prefix)?.to_ascii_lowercase();
            Some((name, value))
        })
        .collect()
}

/// The environment's `ISTIO_META_NAME=text`, and the members of `ISTIO_METAJSON_...={...}`.
fn metadata_from(
    environment: impl Iterator<Item = (String, String)>,
) -> BTreeMap<String, serde_json::Value> {
    let mut metadata = BTreeMap::new();
    for (name, value) in environment {
        if let Some(name) = name.strip_prefix("ISTIO_META_") {
            metadata.insert(name.to_owned(), value.into());
        } else if name.starts_with("ISTIO_METAJSON_") {
            match serde_json::from_str::<serde_json::Map<_, _>>(&value) {
                Ok(members) => metadata.extend(members),
                Err(error) => eprintln!("warning: {name} is no JSON object and not used: {error}"),
            }
        }
    }
    metadata
}

/// A path. Unlike the usual one it may be empty, which says that there is none.
fn path(text: &str) -> Result<PathBuf, std::convert::Infallible> {
    Ok(PathBuf::from(text))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        sources: SourceArgs,
    }

    /// What the flags come to, in short.
    fn come_to(flags: &[&str]) -> Result<(String, String), String> {
        let args = [&["proxy", "--auth-token", ""], flags].concat();
        let sources = Flags::try_parse_from(args)
            .map_err(|e| e.to_string())?
            .sources;
        let (mesh, authority) = sources.sources("c1").map_err(|e| format!("{e:#}"))?;
        let mesh = match mesh {
            MeshSource::File(path) => path.display().to_string(),
            MeshSource::Text(text) => text,
            MeshSource::ControlPlane(followed) => format!(
                "{}{}",
                followed.endpoint.address,
                if followed.on_demand { " on demand" } else { "" }
            ),
        };
        let authority = match authority {
            AuthoritySource::BuiltIn(dir) => dir.display().to_string(),
            AuthoritySource::Remote(endpoint) => endpoint.address.to_string(),
        };
        Ok((mesh, authority))
    }

    const BUILT_IN: &str = "/var/lib/ambidex/ca";

    #[rstest::rstest]
    #[case::nothing(&[], "https://localhost:15012", "https://localhost:15012")]
    #[case::control_plane(&["--xds-address", "a:1"], "https://a:1", "https://a:1")]
    #[case::on_demand(&["--xds-address", "a:1", "--xds-on-demand"], "https://a:1 on demand", "https://a:1")]
    #[case::another_ca(&["--xds-address", "a:1", "--ca-address", "b:2"], "https://a:1", "https://b:2")]
    #[case::built_in_ca(&["--xds-address", "a:1", "--fake-ca"], "https://a:1", BUILT_IN)]
    #[case::no_ca_address(&["--xds-address", "a:1", "--ca-address", ""], "https://a:1", BUILT_IN)]
    #[case::a_file_wins(&["--local-xds", "/f", "--xds-address", "a:1"], "/f", BUILT_IN)]
    #[case::a_text_wins(&["--local-xds-inline", "{}", "--xds-address", "a:1"], "{}", BUILT_IN)]
    #[case::a_file_and_a_ca(&["--local-xds", "/f", "--ca-address", "b:2"], "/f", "https://b:2")]
    fn where_things_come_from(#[case] flags: &[&str], #[case] mesh: &str, #[case] authority: &str) {
        assert_eq!(come_to(flags), Ok((mesh.to_owned(), authority.to_owned())));
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        let error = |flags| come_to(flags).unwrap_err();
        assert!(
            error(&["--local-xds", "/f", "--local-xds-inline", "{}"]).contains("not from both")
        );
        assert!(error(&["--xds-address", ""]).contains("nothing says where the mesh comes from"));
        assert!(error(&["--xds-address", "ftp://a"]).contains("XDS_ADDRESS: `ftp://a`"));
    }

    #[test]
    fn the_environment_becomes_headers_and_metadata() {
        let environment = || {
            [
                ("XDS_HEADER_FOO", "a"),
                ("CA_HEADER_FOO", "b"),
                ("ISTIO_META_CLUSTER_ID", "c"),
                (
                    "ISTIO_METAJSON_LABELS",
                    r#"{"LABELS": {"app": "z"}, "N": 1}"#,
                ),
                ("ISTIO_METAJSON_BAD", "no"),
            ]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into_iter()
        };
        let headers = headers_from(environment(), "XDS_HEADER_");
        assert_eq!(headers, [("foo".to_owned(), "a".to_owned())]);
        let metadata = serde_json::to_value(metadata_from(environment())).unwrap();
        let wanted = serde_json::json!({"CLUSTER_ID": "c", "LABELS": {"app": "z"}, "N": 1});
        assert_eq!(metadata, wanted);
    }
}
