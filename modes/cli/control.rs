//! `ambidex control`: flags of the control plane.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::Failure;
use crate::control::{self, ControlConfig};
use crate::logging;
use crate::options::duration;

#[derive(Debug, Args)]
pub(crate) struct ControlArgs {
    /// Directory whose *.yaml files, in LOCAL_XDS form, are the mesh; followed
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Address to listen on
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:15012")]
    listen: SocketAddr,
    /// Directory of the CA; made when it is absent. Its root-cert.pem is what proxies need
    #[arg(
        long,
        env = "AMBIDEX_CA_DIR",
        value_name = "DIR",
        default_value = "/var/lib/ambidex/ca"
    )]
    ca_dir: PathBuf,
    /// Trust domain of the mesh
    #[arg(long, env = "TRUST_DOMAIN", default_value = "cluster.local")]
    trust_domain: String,
    /// DNS name or address under which proxies reach this; may be given several times. The listening address, localhost
    /// and istiod need not be named
    #[arg(long = "name", value_name = "NAME")]
    names: Vec<String>,
    /// File with the token that proxies must send; without it everybody who can connect is served
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Longest lifetime of workload certificates, such as 24h
    #[arg(long, value_name = "DURATION", value_parser = duration::parse, default_value = "24h")]
    longest_ttl: Duration,
    /// Write the root certificate to this file too
    #[arg(long, value_name = "FILE")]
    root_file: Option<PathBuf>,
}

pub(crate) fn run(args: ControlArgs) -> Result<(), Failure> {
    let _log = logging::start()?;
    let mut names: Vec<String> = [
        "localhost",
        "127.0.0.1",
        "::1",
        "istiod",
        "istiod.istio-system",
        "istiod.istio-system.svc",
    ]
    .map(str::to_owned)
    .into();
    let listen = args.listen.ip();
    if !listen.is_unspecified() {
        names.push(listen.to_string());
    }
    names.extend(args.names);
    let mut seen = std::collections::BTreeSet::<String>::new();
    names.retain(|name| {
        seen.insert(
            name.parse::<IpAddr>()
                .map_or_else(|_| name.clone(), |ip| ip.to_string()),
        )
    });
    let config = ControlConfig {
        dir: args.dir,
        listen: args.listen,
        ca_dir: args.ca_dir,
        trust_domain: args.trust_domain,
        names,
        token: args.token_file,
        longest_ttl: args.longest_ttl,
        root_file: args.root_file,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(control::run(config))?;
    Ok(())
}
