//! Connections to a control plane: TCP, TLS, HTTP/2.
//!
//! One connection serves one stream of discovery, or the requests for certificates until it breaks. What may change while
//! the program runs - the roots, the token, the address behind the name - is read again for each.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::BoxFuture;
use http::uri::{Authority, InvalidUri, Scheme, Uri};
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, InvalidDnsNameError, ServerName};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore};
use shared_proxy::identity::{ALPN_H2, provider};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::body::Body;
use tonic::client::{Grpc, GrpcService};
use tonic::metadata::{Ascii, MetadataKey, MetadataMap, MetadataValue};

/// The port of an address that names none: that of the field's control plane.
pub const DEFAULT_PORT: u16 = 15012;

/// Connecting, TLS and HTTP/2 prefaces included, may take this long.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// A quiet connection is tested this often, and given up when the test is not answered; the field's values.
const KEEPALIVE: Keepalive = Keepalive {
    interval: Duration::from_secs(30),
    timeout: Duration::from_secs(10),
};
/// A message may be this large: the first answer holds the whole mesh.
pub(crate) const MAX_MESSAGE: usize = 200 * 1024 * 1024;
/// Receive windows: the first answer is large, and comes from one peer that is trusted.
const STREAM_WINDOW: u32 = 4 * 1024 * 1024;
const CONNECTION_WINDOW: u32 = 8 * 1024 * 1024;

/// Which roots vouch for the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Roots {
    /// Those in a PEM file, read for each connection.
    File(PathBuf),
    /// Those in a text, PEM.
    Text(String),
    /// Those of the operating system.
    System,
}

/// What proves who asks.
#[derive(Clone, PartialEq, Eq)]
pub enum Token {
    /// The content of a file, read for each call.
    File(PathBuf),
    /// This text.
    Text(String),
}

/// A token is not for the log.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Text(_) => f.write_str("Text(..)"),
        }
    }
}

/// How a connection on which nothing comes is found to be dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    /// It is tested after so long without a frame.
    pub interval: Duration,
    /// And given up when the test is not answered within this.
    pub timeout: Duration,
}

impl Default for Keepalive {
    /// The field's: 30 s and 10 s.
    fn default() -> Self {
        KEEPALIVE
    }
}

/// How a control plane is reached, and what it is told about the caller.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// Where.
    pub address: Address,
    /// Who vouches for it.
    pub roots: Roots,
    /// The name in its certificate, if it is another than in the address.
    pub server_name: Option<String>,
    /// What proves who asks. None: nothing is proved.
    pub token: Option<Token>,
    /// The caller's cluster, sent as `clusterid`.
    pub cluster_id: String,
    /// Further metadata.
    pub headers: Vec<(String, String)>,
    /// How a server that went silent is noticed.
    pub keepalive: Keepalive,
}

/// `host:port`, with or without `https://`; after `http://` the connection is not encrypted, and no token is sent on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    authority: Authority,
    encrypted: bool,
}

/// A text that is no address of a control plane.
#[derive(Debug, thiserror::Error)]
#[error("`{text}` is not the address of a control plane (host:port, https://host:port or http://host:port){}", .source.as_ref().map(|e| format!(": {e}")).unwrap_or_default())]
pub struct InvalidAddress {
    text: String,
    source: Option<InvalidUri>,
}

impl std::str::FromStr for Address {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = |source| InvalidAddress {
            text: text.to_owned(),
            source,
        };
        let full = if text.contains("://") {
            text.to_owned()
        } else {
            format!("https://{text}")
        };
        let uri: Uri = full.parse().map_err(|e| invalid(Some(e)))?;
        let encrypted = uri.scheme() == Some(&Scheme::HTTPS);
        let plain = uri.scheme() == Some(&Scheme::HTTP);
        let whole = matches!(uri.path(), "" | "/") && uri.query().is_none();
        // What follows the host must be a port: one that is none would otherwise be taken for none given.
        let exact = |authority: &Authority| {
            let host = authority.host();
            let port = authority.as_str().strip_prefix(host);
            port == Some("") || authority.port_u16().is_some()
        };
        match uri.authority() {
            Some(authority)
                if (encrypted || plain)
                    && whole
                    && exact(authority)
                    && !authority.as_str().contains('@') =>
            {
                Ok(Self {
                    authority: authority.clone(),
                    encrypted,
                })
            }
            _ => Err(invalid(None)),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.encrypted { "https" } else { "http" };
        write!(f, "{scheme}://{}", self.authority)
    }
}

impl Address {
    /// Without the brackets of an IPv6 address.
    fn host(&self) -> &str {
        let host = self.authority.host();
        host.strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(host)
    }

    fn port(&self) -> u16 {
        self.authority.port_u16().unwrap_or(DEFAULT_PORT)
    }

    fn origin(&self) -> Result<Uri, http::Error> {
        let scheme = if self.encrypted {
            Scheme::HTTPS
        } else {
            Scheme::HTTP
        };
        Uri::builder()
            .scheme(scheme)
            .authority(self.authority.clone())
            .path_and_query("/")
            .build()
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// A file cannot be read.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file's content is unusable.
    #[error("{path}: {reason}")]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The operating system's roots cannot be had.
    #[error("roots of the operating system: {0}")]
    SystemRoots(String),
    /// The server's name is not one.
    #[error("`{0}` is not a server's name: {1}")]
    ServerName(String, InvalidDnsNameError),
    /// A header is not one.
    #[error("header {0} is not valid")]
    Header(String),
    /// The server cannot be reached.
    #[error("{address}: {source}")]
    Tcp {
        /// Where.
        address: Address,
        /// What the system said.
        source: io::Error,
    },
    /// The server could not prove who it is, or does not speak TLS.
    #[error("TLS with {address}: {source}")]
    Tls {
        /// Where.
        address: Address,
        /// What TLS said.
        source: io::Error,
    },
    /// TLS cannot be set up.
    #[error("TLS: {0}")]
    Config(#[from] rustls::Error),
    /// The server does not speak HTTP/2.
    #[error("HTTP/2 with {address}: {source}")]
    Http {
        /// Where.
        address: Address,
        /// What went wrong.
        source: hyper::Error,
    },
    /// The address makes no URI.
    #[error(transparent)]
    Uri(#[from] http::Error),
    /// It takes too long.
    #[error("{0}: not connected within {CONNECT_WITHIN:?}")]
    Timeout(Address),
}

impl Endpoint {
    /// A connection on which calls can be made.
    pub(crate) async fn connect(&self) -> Result<Grpc<Connection>, ConnectError> {
        tokio::time::timeout(CONNECT_WITHIN, self.connect_patiently())
            .await
            .map_err(|_| ConnectError::Timeout(self.address.clone()))?
    }

    #[allow(
        clippy::disallowed_methods,
        reason = "the proxy's own connection: it belongs to no pod and to no scope"
    )]
    async fn connect_patiently(&self) -> Result<Grpc<Connection>, ConnectError> {
        let address = &self.address;
        let tcp = TcpStream::connect((address.host(), address.port()))
            .await
            .and_then(|tcp| {
                tcp.set_nodelay(true)?;
                Ok(tcp)
            })
            .map_err(|source| ConnectError::Tcp {
                address: address.clone(),
                source,
            })?;
        let sender = if address.encrypted {
            let name = self.server_name.as_deref().unwrap_or(address.host());
            let server = ServerName::try_from(name.to_owned())
                .map_err(|e| ConnectError::ServerName(name.to_owned(), e))?;
            let roots = self.roots.clone();
            // Reads files, the operating system's roots many of them.
            let config = tokio::task::spawn_blocking(move || client_config(&roots))
                .await
                .map_err(|e| ConnectError::SystemRoots(e.to_string()))??;
            let tls = TlsConnector::from(Arc::new(config))
                .connect(server, tcp)
                .await
                .map_err(|source| ConnectError::Tls {
                    address: address.clone(),
                    source,
                })?;
            self.speak_http(tls).await?
        } else {
            self.speak_http(tcp).await?
        };
        Ok(Grpc::with_origin(Connection { sender }, address.origin()?)
            .max_decoding_message_size(MAX_MESSAGE))
    }

    async fn speak_http<IO>(&self, io: IO) -> Result<SendRequest<Body>, ConnectError>
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(self.keepalive.interval)
            .keep_alive_timeout(self.keepalive.timeout)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .handshake(TokioIo::new(io))
            .await
            .map_err(|source| ConnectError::Http {
                address: self.address.clone(),
                source,
            })?;
        // Ends with the last of its senders and streams, which report its errors.
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection to the control plane");
            }
        });
        Ok(sender)
    }

    /// What accompanies a call: the token as it is at this moment, the cluster, and further headers.
    pub(crate) fn metadata(&self) -> Result<MetadataMap, ConnectError> {
        let mut metadata = MetadataMap::new();
        if let Some(token) = &self.token
            && self.address.encrypted
        {
            const UNUSABLE: &str = "not a token: it has characters that no header may have";
            let (token, path) = match token {
                Token::File(path) => (read(path)?, Some(path)),
                Token::Text(text) => (text.clone(), None),
            };
            let unusable = |_| match path {
                Some(path) => ConnectError::Content {
                    path: path.clone(),
                    reason: UNUSABLE.to_owned(),
                },
                None => ConnectError::Header(format!("authorization ({UNUSABLE})")),
            };
            let mut value: MetadataValue<Ascii> = format!("Bearer {}", token.trim())
                .parse()
                .map_err(unusable)?;
            value.set_sensitive(true);
            metadata.insert("authorization", value);
        }
        let cluster = [("clusterid".to_owned(), self.cluster_id.clone())];
        for (name, text) in cluster.iter().chain(&self.headers) {
            let invalid = || ConnectError::Header(name.clone());
            let key: MetadataKey<Ascii> = name.parse().map_err(|_| invalid())?;
            metadata.insert(key, text.parse().map_err(|_| invalid())?);
        }
        Ok(metadata)
    }
}

fn read(path: &Path) -> Result<String, ConnectError> {
    std::fs::read_to_string(path).map_err(|source| ConnectError::File {
        path: path.to_owned(),
        source,
    })
}

fn client_config(roots: &Roots) -> Result<ClientConfig, ConnectError> {
    let mut store = RootCertStore::empty();
    match roots {
        Roots::File(path) => {
            add_roots(&mut store, &read(path)?, path)?;
        }
        Roots::Text(pem) => add_roots(&mut store, pem, Path::new("roots given as a text"))?,
        Roots::System => {
            let found = rustls_native_certs::load_native_certs();
            // A few that cannot be read are usual.
            store.add_parsable_certificates(found.certs);
            if store.is_empty() {
                let why = found.errors.first().map(ToString::to_string);
                let why = why.unwrap_or_else(|| "there are none".to_owned());
                return Err(ConnectError::SystemRoots(why));
            }
        }
    }
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(store)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    Ok(config)
}

/// Adds the certificates of a text, which came from `path`.
fn add_roots(store: &mut RootCertStore, pem: &str, path: &Path) -> Result<(), ConnectError> {
    let content = |reason: String| ConnectError::Content {
        path: path.to_owned(),
        reason,
    };
    for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
        let certificate = certificate.map_err(|e| content(e.to_string()))?;
        store.add(certificate).map_err(|e| content(e.to_string()))?;
    }
    if store.is_empty() {
        return Err(content("no certificate in PEM".to_owned()));
    }
    Ok(())
}

/// An HTTP/2 connection.
#[derive(Debug, Clone)]
pub(crate) struct Connection {
    sender: SendRequest<Body>,
}

impl GrpcService<Body> for Connection {
    type ResponseBody = hyper::body::Incoming;
    type Error = hyper::Error;
    type Future = BoxFuture<'static, Result<http::Response<Self::ResponseBody>, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.sender.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.sender.send_request(request))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[rstest::rstest]
    #[case("istiod:15012", Some(("https://istiod:15012", "istiod", 15012)))]
    #[case("istiod.istio-system.svc", Some(("https://istiod.istio-system.svc", "istiod.istio-system.svc", 15012)))]
    #[case("https://10.0.0.1:1/", Some(("https://10.0.0.1:1", "10.0.0.1", 1)))]
    #[case("https://[fd00::1]:443", Some(("https://[fd00::1]:443", "fd00::1", 443)))]
    #[case("http://localhost:15010", Some(("http://localhost:15010", "localhost", 15010)))]
    #[case("", None)]
    #[case("ftp://a:1", None)]
    #[case("https://a:1/path", None)]
    #[case("https://user@a:1", None)]
    #[case("a b", None)]
    #[case("unix:///run/istiod.sock", None)]
    #[case("a:70000", None)]
    #[case("https://a:", None)]
    fn addresses(#[case] text: &str, #[case] wanted: Option<(&str, &str, u16)>) {
        let address = text.parse::<Address>();
        let parts = address
            .as_ref()
            .ok()
            .map(|a| (a.to_string(), a.host(), a.port()));
        assert_eq!(
            parts,
            wanted.map(|(text, host, port)| (text.to_owned(), host, port))
        );
    }

    fn endpoint(address: &str, token: &Path) -> Endpoint {
        Endpoint {
            address: address.parse().unwrap(),
            roots: Roots::System,
            server_name: None,
            token: Some(Token::File(token.to_owned())),
            cluster_id: "c1".to_owned(),
            headers: vec![("x-extra".to_owned(), "1".to_owned())],
            keepalive: Keepalive::default(),
        }
    }

    #[test]
    fn the_token_is_read_each_time_and_never_sent_in_the_clear() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "one\n").unwrap();
        let encrypted = endpoint("a:1", file.path());
        let text = |metadata: &MetadataMap, name: &str| {
            let value = metadata.get(name).unwrap();
            value.to_str().unwrap().to_owned()
        };
        let token = || text(&encrypted.metadata().unwrap(), "authorization");
        assert_eq!(token(), "Bearer one");
        std::fs::write(file.path(), "two").unwrap();
        assert_eq!(token(), "Bearer two");
        let plain = endpoint("http://a:1", file.path()).metadata().unwrap();
        assert!(plain.get("authorization").is_none());
        assert_eq!(text(&plain, "clusterid"), "c1");
        assert_eq!(text(&plain, "x-extra"), "1");
        std::fs::remove_file(file.path()).unwrap();
        let error = encrypted.metadata().unwrap_err().to_string();
        assert!(
            error.contains(&file.path().display().to_string()),
            "{error}"
        );
    }
}
