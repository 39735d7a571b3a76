//! HTTP: connections, and the streams of watches.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use host_net::netns::Netns;
use http::{Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::answers::{Query, Target, answer, discovery, selector, status, verb};
use super::selector::Selector;
use super::store::{Refusal, Store};

/// Time between two bookmarks of a watch.
const BOOKMARK_EVERY: Duration = Duration::from_secs(1);

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// A running server. It ends, with all its connections, when this is dropped.
#[derive(Debug)]
pub struct Server {
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves a store at an address of a network namespace.
    pub fn start(netns: &Netns, address: SocketAddr, store: &Arc<Store>) -> Self {
        #[allow(
            clippy::disallowed_methods,
            reason = "a server of a test, no part of the proxy"
        )]
        let listener = netns.run(|| std::net::TcpListener::bind(address)).unwrap();
        let listener = listener.unwrap_or_else(|error| panic!("{address}: {error}"));
        listener.set_nonblocking(true).unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let store = Arc::clone(store);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.unwrap().block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                tokio::select! {
                    () = accept(listener, store) => {}
                    _ = stopped => {}
                }
            });
        });
        Self {
            stop: Some(stop),
            thread: Some(thread),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn accept(listener: tokio::net::TcpListener, store: Arc<Store>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                let store = Arc::clone(&store);
                let service = service_fn(move |request| respond(Arc::clone(&store), request));
                let connection = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service);
                connections.spawn(async move { drop(connection.await) });
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn respond(
    store: Arc<Store>,
    request: Request<Incoming>,
) -> Result<Response<Body>, http::Error> {
    let (head, body) = request.into_parts();
    let body = body
        .collect()
        .await
        .map(|body| body.to_bytes())
        .unwrap_or_default();
    let path = head.uri.path();
    if let Some(page) = discovery(path) {
        return whole(StatusCode::OK, &page);
    }
    let query = parameters(head.uri.query().unwrap_or_default());
    let answered = (|| {
        let target = Target::parse(path).ok_or_else(|| {
            (
                404,
                "NotFound",
                "the server could not find the requested resource".to_owned(),
            )
        })?;
        let verb = verb(&head.method, &target, &query);
        store.authorize(verb, &target.resource(), &target.name)?;
        if verb == "watch" {
            return Watch::new(&store, target, &query).map(Err);
        }
        let content_type = head.headers.get(http::header::CONTENT_TYPE);
        let content_type = content_type
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        let answer = answer(&store, verb, &target, &query, content_type, &body)?;
        let created = if verb == "create" {
            StatusCode::CREATED
        } else {
            StatusCode::OK
        };
        Ok(Ok((created, answer)))
    })();
    match answered {
        Ok(Ok((code, answer))) => whole(code, &answer),
        Ok(Err(watch)) => {
            let frames = stream::unfold(watch, |mut watch| async {
                let line = watch.next().await?;
                Some((Ok(Frame::data(Bytes::from(format!("{line}\n")))), watch))
            });
            Response::builder()
                .header(http::header::CONTENT_TYPE, "application/json")
                .body(StreamBody::new(frames).boxed_unsync())
        }
        Err(refusal) => whole(StatusCode::from_u16(refusal.0).unwrap(), &status(&refusal)),
    }
}

fn whole(code: StatusCode, value: &Value) -> Result<Response<Body>, http::Error> {
    Response::builder()
        .status(code)
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(value.to_string())).boxed_unsync())
}

fn parameters(query: &str) -> Query {
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    pairs
        .map(|(name, value)| (name.to_owned(), decoded(value)))
        .collect()
}

/// Without percent signs and plus signs.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        match byte {
            b'+' => bytes.push(b' '),
            b'%' => {
                let digits: Vec<u8> = rest.by_ref().take(2).collect();
                let digits = String::from_utf8(digits).unwrap_or_default();
                bytes.extend(u8::from_str_radix(&digits, 16));
            }
            other => bytes.push(other),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// What is still to be sent of a watch.
struct Watch {
    store: Arc<Store>,
    target: Target,
    selector: Selector,
    changes: watch::Receiver<u64>,
    /// Sent up to here.
    version: u64,
    ready: std::collections::VecDeque<Value>,
    bookmarks: bool,
    /// Nothing comes after what is ready.
    ended: bool,
}

impl Watch {
    fn new(store: &Arc<Store>, target: Target, query: &Query) -> Result<Self, Refusal> {
        let selector = selector(query)?;
        let changes = store.changes();
        let mut ready = std::collections::VecDeque::new();
        let from = query.get("resourceVersion").map_or("", String::as_str);
        let version = if ["", "0"].contains(&from) {
            let (version, objects) = store.list(target.kind, &target.namespace);
            let selected = objects
                .into_iter()
                .filter(|object| selector.matches(object));
            ready.extend(selected.map(|object| json!({"type": "ADDED", "object": object})));
            version
        } else {
            from.parse()
                .map_err(|_| (400, "BadRequest", format!("resourceVersion {from:?}")))?
        };
        Ok(Self {
            store: Arc::clone(store),
            target,
            selector,
            changes,
            version,
            ready,
            bookmarks: query
                .get("allowWatchBookmarks")
                .is_some_and(|value| value == "true"),
            ended: false,
        })
    }

    async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.ended {
                return None;
            }
            self.changes.borrow_and_update();
            self.collect();
            if !self.ready.is_empty() {
                continue;
            }
            if tokio::time::timeout(BOOKMARK_EVERY, self.changes.changed())
                .await
                .is_err()
                && self.bookmarks
            {
                let version = self.version.to_string();
                return Some(json!({"type": "BOOKMARK", "object": {
                    "kind": self.target.kind.name(), "apiVersion": self.target.kind.api_version(),
                    "metadata": {"resourceVersion": version},
                }}));
            }
        }
    }

    /// Makes events of the changes since the last time. An object that is not selected any more is deleted for whoever
    /// watches.
    fn collect(&mut self) {
        let Some((changes, version)) = self.store.since(self.version) else {
            let gone = (
                410,
                "Expired",
                format!("too old resource version: {}", self.version),
            );
            self.ready
                .push_back(json!({"type": "ERROR", "object": status(&gone)}));
            self.ended = true;
            return;
        };
        self.version = version;
        for change in changes {
            let (kind, namespace, name) = &change.key;
            let meant = *kind == self.target.kind
                && (self.target.namespace.is_empty() || self.target.namespace == *namespace)
                && (self.target.name.is_empty() || self.target.name == *name);
            if !meant {
                continue;
            }
            let selected = |object: &Value| self.selector.matches(object);
            let was = change.before.as_ref().is_some_and(selected);
            let is = change.after.as_ref().is_some_and(selected);
            let (type_, object) = match (was, is) {
                (false, true) => ("ADDED", change.after),
                (true, true) => ("MODIFIED", change.after),
                (true, false) => ("DELETED", change.after.or(change.before)),
                (false, false) => continue,
            };
            self.ready
                .push_back(json!({"type": type_, "object": object}));
        }
    }
}
