//! HTTP/1.1 over Unix sockets: the agent's API, and the events that the CNI plugin sends to the agent.

use std::future::Future;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Weak};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{UnixListener, UnixStream};

/// Largest body taken in either direction, in bytes. A node has at most a few hundred pods; a plan has 100 steps.
const BODY_LIMIT: usize = 16 << 20;

/// Why a request could not be made.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// Nobody listens.
    #[error(
        "{0}: {1}: is the agent of this node running? (`ambidex agent`, or AMBIDEX_RUN_DIR names another node)"
    )]
    Connect(PathBuf, #[source] io::Error),
    /// The peer does not speak HTTP, or closed early.
    #[error("{0}: {1}")]
    Http(PathBuf, String),
    /// No answer in time.
    #[error("{0}: no answer within {1:?}")]
    Timeout(PathBuf, Duration),
}

impl RequestError {
    /// Whether nobody listens at all.
    pub fn is_nobody(&self) -> bool {
        let kind = match self {
            Self::Connect(_, error) => error.kind(),
            _ => return false,
        };
        matches!(
            kind,
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
        )
    }
}

/// Sends one request and returns status and body.
pub async fn request(
    socket: &Path,
    method: Method,
    uri: &str,
    body: Vec<u8>,
    timeout: Duration,
) -> Result<(StatusCode, Vec<u8>), RequestError> {
    request_up_to(socket, method, uri, body, timeout, BODY_LIMIT).await
}

/// As [`request`], for an answer of up to `limit` bytes.
pub async fn request_up_to(
    socket: &Path,
    method: Method,
    uri: &str,
    body: Vec<u8>,
    timeout: Duration,
    limit: usize,
) -> Result<(StatusCode, Vec<u8>), RequestError> {
    let exchange = async {
        let stream = UnixStream::connect(socket)
            .await
            .map_err(|e| RequestError::Connect(socket.to_owned(), e))?;
        let http_error =
            |e: &dyn std::fmt::Display| RequestError::Http(socket.to_owned(), e.to_string());
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| http_error(&e))?;
        let driver = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(uri)
            .header(http::header::HOST, "unix")
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|e| http_error(&e))?;
        let response = sender
            .send_request(request)
            .await
            .map_err(|e| http_error(&e))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), limit)
            .collect()
            .await
            .map_err(|e| http_error(&e))?;
        driver.abort();
        Ok((status, body.to_bytes().to_vec()))
    };
    tokio::time::timeout(timeout, exchange)
        .await
        .map_err(|_| RequestError::Timeout(socket.to_owned(), timeout))?
}

/// Answer of a handler: status, and text or JSON.
pub struct Answer {
    status: StatusCode,
    body: Vec<u8>,
    json: bool,
}

impl Answer {
    /// A plain text answer.
    pub fn text(status: StatusCode, body: impl Into<String>) -> Self {
        Self {
            status,
            body: body.into().into_bytes(),
            json: false,
        }
    }

    /// Its status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// A JSON answer.
    pub fn json<T: serde::Serialize>(value: &T) -> Self {
        match serde_json::to_vec_pretty(value) {
            Ok(body) => Self {
                status: StatusCode::OK,
                body,
                json: true,
            },
            Err(error) => Self::text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        }
    }
}

/// The one who made a request.
#[derive(Debug, Clone)]
pub struct Caller(Weak<()>);

impl Caller {
    /// The agent itself: never leaves.
    pub fn own() -> Self {
        static OWN: LazyLock<Arc<()>> = LazyLock::new(Arc::default);
        Self(Arc::downgrade(&OWN))
    }

    /// Whether nobody waits for the answer any more.
    pub fn has_left(&self) -> bool {
        self.0.strong_count() == 0
    }
}

/// Listens on `path` for root only: the file is made with mode 0600 and every peer's credentials are checked. A stale
/// socket file is removed first.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves requests until the task is dropped. The handler gets method, path with query, body, and who asks. It always
/// runs to its end, also when the caller leaves: half of what it does may be worse than all of it.
pub async fn serve<H, F>(listener: UnixListener, handler: H)
where
    H: Fn(Method, String, Vec<u8>, Caller) -> F + Clone + Send + 'static,
    F: Future<Output = Answer> + Send + 'static,
{
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept on a Unix socket");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        if !stream.peer_cred().is_ok_and(|peer| peer.uid() == 0) {
            tracing::warn!("a process that is not root was turned away from the agent's socket");
            continue;
        }
        let handler = handler.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| answer(request, handler.clone()));
            if let Err(error) = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await
            {
                tracing::debug!(%error, "a client of the agent's socket went away");
            }
        });
    }
}

async fn answer<H, F>(
    request: Request<Incoming>,
    handler: H,
) -> Result<Response<Full<Bytes>>, http::Error>
where
    H: Fn(Method, String, Vec<u8>, Caller) -> F,
    F: Future<Output = Answer> + Send + 'static,
{
    let method = request.method().clone();
    let uri = request
        .uri()
        .path_and_query()
        .map_or_else(String::new, |p| p.as_str().to_owned());
    let answer = match Limited::new(request.into_body(), BODY_LIMIT)
        .collect()
        .await
    {
        Ok(body) => {
            // This function is dropped when the caller closes the connection, and this with it.
            let waiting = Arc::new(());
            let caller = Caller(Arc::downgrade(&waiting));
            tokio::spawn(handler(method, uri, body.to_bytes().to_vec(), caller))
                .await
                .unwrap_or_else(|error| {
                    Answer::text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n"))
                })
        }
        Err(error) => Answer::text(
            StatusCode::BAD_REQUEST,
            format!("the body cannot be read: {error}\n"),
        ),
    };
    let content_type = if answer.json {
        "application/json"
    } else {
        "text/plain; charset=utf-8"
    };
    Response::builder()
        .status(answer.status)
        .header(http::header::CONTENT_TYPE, content_type)
        .body(Full::new(Bytes::from(answer.body)))
}
