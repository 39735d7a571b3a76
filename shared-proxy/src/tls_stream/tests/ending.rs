//! How connections and handshakes end.

use std::io::ErrorKind;

use rustls::AlertDescription;

use super::*;
use crate::identity::PeerError;

fn reason(error: &io::Error) -> &rustls::Error {
    error.get_ref().unwrap().downcast_ref().unwrap()
}

#[tokio::test]
async fn a_clean_end_leaves_the_other_direction_open() {
    let (mut client, mut server) = pair(1 << 20).await;
    client.write_all(b"request").await.unwrap();
    client.shutdown().await.unwrap();
    let mut received = Vec::new();
    server.read_to_end(&mut received).await.unwrap();
    assert_eq!(received, b"request");
    assert_eq!(server.read(&mut [0; 9]).await.unwrap(), 0);
    server.write_all(&pattern(50_000)).await.unwrap();
    server.shutdown().await.unwrap();
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).await.unwrap();
    assert!(answer == pattern(50_000));
    let late = client.write(b"more").await.unwrap_err();
    assert_eq!(late.kind(), ErrorKind::BrokenPipe);
}

#[tokio::test]
async fn bytes_that_are_cut_off_are_no_clean_end() {
    for missing in [0, 1, 17, 1000] {
        let (mut client, mut server) = pair(1 << 20).await;
        client.write_all(&pattern(40_000)).await.unwrap();
        client.flush().await.unwrap();
        // No close_notify.
        drop(client);
        let mut sent = Vec::new();
        server.io.read_to_end(&mut sent).await.unwrap();
        let (mut near, far) = duplex(1 << 20);
        near.write_all(&sent[..sent.len() - missing]).await.unwrap();
        drop(near);
        server.io = far;
        let mut received = Vec::new();
        let error = server.read_to_end(&mut received).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "{error}");
        assert!(error.to_string().contains("close_notify"), "{error}");
        let whole = if missing == 0 { 40_000 } else { 2 * RECORD };
        assert!(received == pattern(40_000)[..whole], "{}", received.len());
        let again = server.read(&mut [0; 9]).await.unwrap_err();
        assert_eq!(again.kind(), ErrorKind::UnexpectedEof);
    }
}

#[tokio::test]
async fn a_peer_that_leaves_the_handshake_is_an_error() {
    let (near, far) = duplex(1 << 20);
    let (client, server) = tokio::join!(connect(near, client_config()), async { drop(far) },);
    let () = server;
    assert!(matches!(
        client.unwrap_err().kind(),
        ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe
    ));

    let (mut near, far) = duplex(1 << 20);
    near.write_all(&[22, 3, 1, 0, 200, 1]).await.unwrap();
    near.shutdown().await.unwrap();
    let error = TlsStream::accept(far, server_config()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    assert!(error.to_string().contains("handshake"), "{error}");
}

#[tokio::test]
async fn a_wrong_server_is_named_and_told() {
    let other: Identity = "spiffe://cluster.local/ns/a/sa/other".parse().unwrap();
    let config = certificate().client_config(std::slice::from_ref(&other));
    let (near, far) = duplex(1 << 20);
    let (client, server) = tokio::join!(
        connect(near, config),
        TlsStream::accept(far, server_config()),
    );
    let error = client.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidData);
    let Some(PeerError::Unexpected { got, wanted }) = PeerError::in_io_error(&error) else {
        panic!("{error}");
    };
    assert_eq!((got, &wanted[..]), (&identity(), &[other][..]));
    let error = server.unwrap_err();
    assert!(
        matches!(reason(&error), rustls::Error::AlertReceived(_)),
        "{error}"
    );
}

#[tokio::test]
async fn a_client_of_another_root_is_refused_by_an_alert() {
    let stranger = issue().await;
    let mut config = ClientConfig::clone(&client_config());
    let key = ClientConfig::clone(&stranger.client_config(&[identity()]));
    config.client_auth_cert_resolver = key.client_auth_cert_resolver;
    let (near, far) = duplex(1 << 20);
    let client = async {
        // The client's part is done before the server's.
        let mut client = TlsStream::connect(near, Arc::new(config), name())
            .await
            .unwrap();
        client.write_all(b"preface").await.unwrap();
        client.flush().await.unwrap();
        let error = client.read(&mut [0; 9]).await.unwrap_err();
        let again = client.read(&mut [0; 9]).await.unwrap_err();
        assert_eq!(error.to_string(), again.to_string());
        assert!(client.write(b"more").await.is_err());
        error
    };
    let (client, server) = tokio::join!(client, TlsStream::accept(far, server_config()));
    let error = server.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidData);
    assert!(
        matches!(reason(&error), rustls::Error::InvalidCertificate(_)),
        "{error}"
    );
    assert_eq!(client.kind(), ErrorKind::InvalidData);
    let refused = [
        AlertDescription::UnknownCA,
        AlertDescription::DecryptError,
        AlertDescription::BadCertificate,
    ];
    let rustls::Error::AlertReceived(alert) = reason(&client) else {
        panic!("{client}");
    };
    assert!(refused.contains(alert), "{client}");
}

#[tokio::test]
async fn forged_bytes_end_the_connection_after_what_was_right() {
    let (mut client, mut server) = pair(1 << 20).await;
    client.write_all(&pattern(20_000)).await.unwrap();
    client.flush().await.unwrap();
    let mut forged = vec![23, 3, 3, 0, 100];
    forged.resize(105, 0xab);
    client.io.write_all(&forged).await.unwrap();
    let mut received = Vec::new();
    let error = server.read_to_end(&mut received).await.unwrap_err();
    assert!(received == pattern(20_000));
    assert_eq!(error.kind(), ErrorKind::InvalidData);
    assert_eq!(reason(&error), &rustls::Error::DecryptError);
    assert!(server.write(b"x").await.is_err());
    let told = client.read(&mut [0; 9]).await.unwrap_err();
    let alert = rustls::Error::AlertReceived(AlertDescription::BadRecordMac);
    assert_eq!(reason(&told), &alert);
}

#[tokio::test]
async fn what_is_no_tls_is_refused() {
    let (mut near, far) = duplex(1 << 20);
    near.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .unwrap();
    let error = TlsStream::accept(far, server_config()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidData);
    assert!(
        matches!(reason(&error), rustls::Error::InvalidMessage(_)),
        "{error}"
    );
}
