use std::time::{Duration, SystemTime};

use control_plane::ca::CaClient;
use control_plane::transport::Token;
use shared_proxy::identity::{CertificateAuthority, Identity};
use tempfile::TempDir;

use crate::rig::{DAY, endpoint, serve};

fn identity(account: &str) -> Identity {
    Identity::new("cluster.local", "default", account).unwrap()
}

#[tokio::test]
async fn a_certificate_proves_what_was_asked_for_as_long_as_was_asked_for() {
    let dir = TempDir::new().unwrap();
    let served = serve(&dir, "127.0.0.1:0", false).await;
    let ca = CaClient::new(
        endpoint(&dir, &served.address.to_string()),
        Duration::from_secs(3600),
    );
    let certificate = ca.issue(&identity("web")).await.unwrap();
    assert_eq!(*certificate.identity(), identity("web"));
    let left = certificate
        .expires()
        .duration_since(SystemTime::now())
        .unwrap();
    assert!((3500..=3600).contains(&left.as_secs()), "{left:?}");
    // Never longer than the control plane allows.
    let greedy = CaClient::new(endpoint(&dir, &served.address.to_string()), 30 * DAY);
    let certificate = greedy.issue(&identity("db")).await.unwrap();
    let left = certificate
        .expires()
        .duration_since(SystemTime::now())
        .unwrap();
    assert!(left <= DAY, "{left:?}");
    let foreign = Identity::new("elsewhere", "default", "web").unwrap();
    let error = ca.issue(&foreign).await.unwrap_err().to_string();
    assert!(
        error.contains("PermissionDenied") && error.contains("trust domain cluster.local only"),
        "{error}"
    );
}

#[tokio::test]
async fn a_lost_connection_is_made_again() {
    let dir = TempDir::new().unwrap();
    let served = serve(&dir, "127.0.0.1:0", false).await;
    let address = served.address.to_string();
    let ca = CaClient::new(endpoint(&dir, &address), DAY);
    ca.issue(&identity("one")).await.unwrap();
    served.stop().await;
    let error = ca.issue(&identity("two")).await.unwrap_err().to_string();
    assert!(
        error.contains(&address) && error.contains("refused"),
        "{error}"
    );
    let _served = serve(&dir, &address, false).await;
    ca.issue(&identity("two")).await.unwrap();
}

#[tokio::test]
async fn a_token_is_needed_and_read_again_on_both_sides() {
    let dir = TempDir::new().unwrap();
    let token = dir.path().join("token");
    let presented = dir.path().join("presented");
    std::fs::write(&token, "first\n").unwrap();
    std::fs::write(&presented, "second").unwrap();
    let served = serve(&dir, "127.0.0.1:0", true).await;
    let without = endpoint(&dir, &served.address.to_string());
    let mut with = without.clone();
    with.token = Some(Token::File(presented));
    let error = CaClient::new(without, DAY)
        .issue(&identity("web"))
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("a bearer token is needed"),
        "{error}"
    );
    let ca = CaClient::new(with, DAY);
    let error = ca.issue(&identity("web")).await.unwrap_err();
    assert!(
        error.to_string().contains("the token is not the right one"),
        "{error}"
    );
    std::fs::write(&token, "second\n").unwrap();
    ca.issue(&identity("web")).await.unwrap();
}
