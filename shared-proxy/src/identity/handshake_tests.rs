//! Handshakes in memory: what each side accepts and refuses.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, IsCa, Issuer, KeyPair,
    PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    CipherSuite, ClientConfig, ClientConnection, Error, HandshakeKind, ProtocolVersion,
    ServerConfig, ServerConnection,
};

use super::*;

pub(super) const ALICE: &str = "spiffe://cluster.local/ns/shop/sa/alice";
pub(super) const BOB: &str = "spiffe://cluster.local/ns/shop/sa/bob";
const STRANGER: &str = "spiffe://other.example/ns/shop/sa/alice";

/// A CA that signs anything.
pub(super) struct TestCa {
    pub(super) issuer: Issuer<'static, KeyPair>,
    pub(super) root: CertificateDer<'static>,
}

impl TestCa {
    pub(super) fn new() -> Self {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap().der().clone();
        Self {
            issuer: Issuer::new(params, key),
            root,
        }
    }

    /// A leaf with these URI SANs and a DNS SAN, valid from a minute ago until `expires`.
    pub(super) fn leaf(
        &self,
        uris: &[&str],
        expires: SystemTime,
    ) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        self.leaf_from(uris, SystemTime::now() - Duration::from_secs(60), expires)
    }

    fn leaf_from(
        &self,
        uris: &[&str],
        begins: SystemTime,
        expires: SystemTime,
    ) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let mut params = CertificateParams::default();
        params.not_before = begins.into();
        params.not_after = expires.into();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::DnsName("peer.example".try_into().unwrap())];
        for uri in uris {
            let uri = SanType::URI((*uri).try_into().unwrap());
            params.subject_alt_names.push(uri);
        }
        let leaf = params.signed_by(&key, &self.issuer).unwrap().der().clone();
        let key = PrivatePkcs8KeyDer::from(key.serialize_der());
        (leaf, PrivateKeyDer::from(key))
    }

    pub(super) fn certificate(&self, identity: &str) -> WorkloadCertificate {
        let (leaf, key) = self.leaf(&[identity], in_an_hour());
        let roots = vec![self.root.clone()];
        WorkloadCertificate::new(id(identity), vec![leaf], key, roots).unwrap()
    }

    /// What presents a leaf that no `WorkloadCertificate` would accept.
    fn presenter(&self, uris: &[&str], expires: SystemTime) -> Arc<SingleCertAndKey> {
        let (leaf, key) = self.leaf(uris, expires);
        let key = CertifiedKey::from_der(vec![leaf], key, &provider()).unwrap();
        Arc::new(SingleCertAndKey::from(key))
    }
}

pub(super) fn in_an_hour() -> SystemTime {
    SystemTime::now() + Duration::from_secs(3600)
}

pub(super) fn id(text: &str) -> Identity {
    text.parse().unwrap()
}

pub(super) struct Outcome {
    client: ClientConnection,
    server: ServerConnection,
    pub(super) client_result: Result<(), Error>,
    pub(super) server_result: Result<(), Error>,
}

/// Passes bytes to and fro until both sides have nothing left to say.
pub(super) fn handshake(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Outcome {
    let name = ServerName::from(std::net::IpAddr::from([127, 0, 0, 1]));
    let mut outcome = Outcome {
        client: ClientConnection::new(client, name).unwrap(),
        server: ServerConnection::new(server).unwrap(),
        client_result: Ok(()),
        server_result: Ok(()),
    };
    for _ in 0..10 {
        let mut flight = Vec::new();
        while outcome.client.wants_write() {
            outcome.client.write_tls(&mut flight).unwrap();
        }
        let mut rest = &flight[..];
        while !rest.is_empty() && outcome.server_result.is_ok() {
            outcome.server.read_tls(&mut rest).unwrap();
            outcome.server_result = outcome.server.process_new_packets().map(drop);
        }
        let mut flight = Vec::new();
        while outcome.server.wants_write() {
            outcome.server.write_tls(&mut flight).unwrap();
        }
        let mut rest = &flight[..];
        while !rest.is_empty() && outcome.client_result.is_ok() {
            outcome.client.read_tls(&mut rest).unwrap();
            outcome.client_result = outcome.client.process_new_packets().map(drop);
        }
    }
    outcome
}

impl Outcome {
    pub(super) fn established(&self) -> bool {
        let open = !self.client.is_handshaking() && !self.server.is_handshaking();
        open && self.client_result.is_ok() && self.server_result.is_ok()
    }

    pub(super) fn client_error(&self) -> String {
        assert!(
            self.server.is_handshaking(),
            "the server took the connection"
        );
        self.client_result.as_ref().unwrap_err().to_string()
    }

    pub(super) fn server_error(&self) -> String {
        assert!(
            self.server.is_handshaking(),
            "the server took the connection"
        );
        self.server_result.as_ref().unwrap_err().to_string()
    }
}

#[test]
fn both_sides_learn_who_the_other_is() {
    let ca = TestCa::new();
    let (alice, bob) = (ca.certificate(ALICE), ca.certificate(BOB));
    let done = handshake(alice.client_config(&[id(BOB)]), bob.server_config());
    assert!(done.established());
    let seen_by_server = done.server.peer_certificates().unwrap();
    assert_eq!(peer_identity(seen_by_server).unwrap(), id(ALICE));
    let seen_by_client = done.client.peer_certificates().unwrap();
    assert_eq!(peer_identity(seen_by_client).unwrap(), id(BOB));
    for alpn in [done.client.alpn_protocol(), done.server.alpn_protocol()] {
        assert_eq!(alpn, Some(ALPN_H2));
    }
    assert_eq!(
        done.client.protocol_version(),
        Some(ProtocolVersion::TLSv1_3)
    );
    assert_eq!(
        done.client.negotiated_cipher_suite().unwrap().suite(),
        CipherSuite::TLS13_AES_256_GCM_SHA384
    );
    assert_eq!(done.server.server_name(), None, "no SNI is sent");
}

#[test]
fn offers_two_suites_aes_256_first() {
    let suites: Vec<_> = provider().cipher_suites.iter().map(|s| s.suite()).collect();
    assert_eq!(
        suites,
        [
            CipherSuite::TLS13_AES_256_GCM_SHA384,
            CipherSuite::TLS13_AES_128_GCM_SHA256
        ]
    );
}

#[test]
fn no_session_is_ever_resumed() {
    let ca = TestCa::new();
    let (alice, bob) = (ca.certificate(ALICE), ca.certificate(BOB));
    for _ in 0..3 {
        let done = handshake(alice.client_config(&[id(BOB)]), bob.server_config());
        assert!(done.established());
        assert_eq!(done.client.handshake_kind(), Some(HandshakeKind::Full));
        assert_eq!(done.client.tls13_tickets_received(), 0);
    }
    // Neither does a client that would like to.
    let mut eager = ClientConfig::clone(&alice.client_config(&[id(BOB)]));
    eager.resumption = rustls::client::Resumption::in_memory_sessions(16);
    let eager = Arc::new(eager);
    for _ in 0..2 {
        let done = handshake(Arc::clone(&eager), bob.server_config());
        assert!(done.established());
        assert_eq!(done.client.handshake_kind(), Some(HandshakeKind::Full));
    }
}

#[test]
fn the_client_says_whom_it_got_and_whom_it_wanted() {
    let ca = TestCa::new();
    let (alice, bob) = (ca.certificate(ALICE), ca.certificate(BOB));
    let carol = id("spiffe://cluster.local/ns/shop/sa/carol");
    let wanted = [carol, id(ALICE)];
    let done = handshake(alice.client_config(&wanted), bob.server_config());
    let error = done.client_error();
    let text =
        format!("the peer is {BOB}, wanted spiffe://cluster.local/ns/shop/sa/carol or {ALICE}");
    assert!(error.contains(&text), "{error}");
    assert!(done.server_result.is_err(), "the server gets an alert");
    let error = std::io::Error::other(done.client_result.unwrap_err());
    let wanted: Arc<[Identity]> = wanted.into();
    let got = id(BOB);
    assert_eq!(
        PeerError::in_io_error(&error),
        Some(&PeerError::Unexpected { got, wanted })
    );
}

#[test]
fn one_of_several_expected_identities_suffices() {
    let ca = TestCa::new();
    let (alice, bob) = (ca.certificate(ALICE), ca.certificate(BOB));
    let config = alice.client_config(&[id(ALICE), id(BOB)]);
    assert!(handshake(config, bob.server_config()).established());
}

#[test]
fn nobody_expected_means_nobody_accepted() {
    let ca = TestCa::new();
    let (alice, bob) = (ca.certificate(ALICE), ca.certificate(BOB));
    let error = handshake(alice.client_config(&[]), bob.server_config()).client_error();
    assert!(error.contains("wanted nobody"), "{error}");
}

#[test]
fn client_configurations_are_made_once_per_set_of_identities() {
    let alice = TestCa::new().certificate(ALICE);
    let bob = alice.client_config(&[id(BOB)]);
    assert!(Arc::ptr_eq(&bob, &alice.client_config(&[id(BOB)])));
    assert!(!Arc::ptr_eq(&bob, &alice.client_config(&[id(ALICE)])));
    assert!(Arc::ptr_eq(&alice.server_config(), &alice.server_config()));
}

/// What a leaf may not be, and a word of the error.
#[rstest::rstest]
#[case::two_uris(&[BOB, ALICE], "several identities")]
#[case::the_same_twice(&[BOB, BOB], "several identities")]
#[case::another_uri_first(&["https://peer.example", BOB], "several identities")]
#[case::no_uri(&[], "no URI SAN")]
#[case::not_spiffe(&["https://peer.example/ns/shop/sa/bob"], "not of the form")]
#[case::not_a_workload(&["spiffe://cluster.local/gateway"], "not of the form")]
fn a_leaf_must_name_exactly_one_workload(#[case] uris: &[&str], #[case] word: &str) {
    let ca = TestCa::new();
    let alice = ca.certificate(ALICE);
    let presenter = ca.presenter(uris, in_an_hour());

    let mut server = ServerConfig::clone(&ca.certificate(BOB).server_config());
    server.cert_resolver = presenter.clone();
    let done = handshake(alice.client_config(&[id(BOB)]), Arc::new(server));
    let error = done.client_error();
    assert!(error.contains(word), "client: {error}");

    let mut client = ClientConfig::clone(&alice.client_config(&[id(BOB)]));
    client.client_auth_cert_resolver = presenter;
    let done = handshake(Arc::new(client), ca.certificate(BOB).server_config());
    let error = done.server_error();
    assert!(error.contains(word), "server: {error}");
}

#[test]
fn an_expired_leaf_is_refused_by_both_sides() {
    let ca = TestCa::new();
    let (alice, bob) = (ca.certificate(ALICE), ca.certificate(BOB));
    let a_while_ago = SystemTime::now() - Duration::from_secs(2);

    let mut server = ServerConfig::clone(&bob.server_config());
    server.cert_resolver = ca.presenter(&[BOB], a_while_ago);
    let error = handshake(alice.client_config(&[id(BOB)]), Arc::new(server)).client_error();
    assert!(error.contains("expired"), "client: {error}");

    let mut client = ClientConfig::clone(&alice.client_config(&[id(BOB)]));
    client.client_auth_cert_resolver = ca.presenter(&[ALICE], a_while_ago);
    let error = handshake(Arc::new(client), bob.server_config()).server_error();
    assert!(error.contains("expired"), "server: {error}");
}

#[test]
fn a_leaf_that_is_not_valid_yet_is_refused_by_both_sides() {
    let ca = TestCa::new();
    let (alice, bob) = (ca.certificate(ALICE), ca.certificate(BOB));
    let presenter = |uri: &str| {
        let begins = SystemTime::now() + Duration::from_secs(1800);
        let (leaf, key) = ca.leaf_from(&[uri], begins, in_an_hour());
        let key = CertifiedKey::from_der(vec![leaf], key, &provider()).unwrap();
        Arc::new(SingleCertAndKey::from(key))
    };

    let mut server = ServerConfig::clone(&bob.server_config());
    server.cert_resolver = presenter(BOB);
    let error = handshake(alice.client_config(&[id(BOB)]), Arc::new(server)).client_error();
    assert!(error.contains("not valid yet"), "client: {error}");

    let mut client = ClientConfig::clone(&alice.client_config(&[id(BOB)]));
    client.client_auth_cert_resolver = presenter(ALICE);
    let error = handshake(Arc::new(client), bob.server_config()).server_error();
    assert!(error.contains("not valid yet"), "server: {error}");
}

/// While a root is replaced, whoever has a certificate of the old one and whoever has one of the other trust both; so
/// does who was renewed already and trusts the old one still.
#[test]
fn peers_go_on_while_the_root_is_rotated() {
    let (old, young) = (TestCa::new(), TestCa::new());
    let certificate = |ca: &TestCa, identity: &str, trusted: &[&TestCa]| {
        let (leaf, key) = ca.leaf(&[identity], in_an_hour());
        let roots = trusted.iter().map(|ca| ca.root.clone()).collect();
        WorkloadCertificate::new(id(identity), vec![leaf], key, roots).unwrap()
    };
    let both = [&old, &young];
    for (of_alice, of_bob) in [
        (&old, &old),
        (&old, &young),
        (&young, &old),
        (&young, &young),
    ] {
        let alice = certificate(of_alice, ALICE, &both);
        let bob = certificate(of_bob, BOB, &both);
        let done = handshake(alice.client_config(&[id(BOB)]), bob.server_config());
        assert!(done.established());
    }
    let late = certificate(&old, ALICE, &[&old]);
    let bob = certificate(&young, BOB, &both);
    let done = handshake(late.client_config(&[id(BOB)]), bob.server_config());
    let error = done.client_error();
    assert!(
        error.contains("invalid peer certificate"),
        "who has not heard of the other root: {error}"
    );
}

#[test]
fn another_root_is_refused_by_both_sides() {
    let (ours, theirs) = (TestCa::new(), TestCa::new());
    let (alice, bob) = (ours.certificate(ALICE), ours.certificate(BOB));

    let mut server = ServerConfig::clone(&bob.server_config());
    server.cert_resolver = theirs.presenter(&[BOB], in_an_hour());
    let done = handshake(alice.client_config(&[id(BOB)]), Arc::new(server));
    assert!(done.client_error().contains("invalid peer certificate"));

    let mut client = ClientConfig::clone(&alice.client_config(&[id(BOB)]));
    client.client_auth_cert_resolver = theirs.presenter(&[ALICE], in_an_hour());
    let done = handshake(Arc::new(client), bob.server_config());
    assert!(done.server_error().contains("invalid peer certificate"));
}

#[test]
fn a_client_of_another_trust_domain_is_refused() {
    let ca = TestCa::new();
    let (stranger, bob) = (ca.certificate(STRANGER), ca.certificate(BOB));
    let done = handshake(stranger.client_config(&[id(BOB)]), bob.server_config());
    let error = done.server_error();
    let text = format!("the peer is {STRANGER}, of a trust domain other than cluster.local");
    assert!(error.contains(&text), "{error}");
}

#[test]
fn a_client_without_a_certificate_is_refused() {
    let ca = TestCa::new();
    let (alice, bob) = (ca.certificate(ALICE), ca.certificate(BOB));
    let mut client = ClientConfig::clone(&alice.client_config(&[id(BOB)]));
    client.client_auth_cert_resolver = Arc::new(NoCertificate);
    let done = handshake(Arc::new(client), bob.server_config());
    assert!(done.server_error().contains("no certificates"));
}

#[derive(Debug)]
struct NoCertificate;

impl rustls::client::ResolvesClientCert for NoCertificate {
    fn resolve(
        &self,
        _hints: &[&[u8]],
        _schemes: &[rustls::SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

#[cfg(feature = "tls-aws-lc")]
use rustls::crypto::aws_lc_rs as everything;
#[cfg(not(feature = "tls-aws-lc"))]
use rustls::crypto::ring as everything;

/// A client that would take any server, with suites and versions of its own.
fn lax_client(
    suites: CryptoProvider,
    version: &'static rustls::SupportedProtocolVersion,
) -> ClientConfig {
    let mut config = ClientConfig::builder_with_provider(Arc::new(suites))
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    config
}

#[test]
fn tls_1_2_is_refused() {
    let bob = TestCa::new().certificate(BOB);
    let client = lax_client(everything::default_provider(), &rustls::version::TLS12);
    let error = handshake(Arc::new(client), bob.server_config()).server_error();
    assert!(error.contains("Tls12NotOfferedOrEnabled"), "{error}");
}

#[test]
fn chacha_is_refused() {
    let bob = TestCa::new().certificate(BOB);
    let mut suites = everything::default_provider();
    suites.cipher_suites = vec![everything::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256];
    let client = lax_client(suites, &rustls::version::TLS13);
    let error = handshake(Arc::new(client), bob.server_config()).server_error();
    assert!(error.contains("NoCipherSuitesInCommon"), "{error}");
}

/// With the restriction both ends agree on the hybrid of X25519 and ML-KEM, against an end without it as well, and an end
/// that has only classical groups is refused.
#[cfg(feature = "tls-aws-lc")]
#[test]
fn post_quantum_only() {
    use super::provider::make;
    use rustls::NamedGroup;

    let ca = TestCa::new();
    let strict_server = {
        let config = ServerConfig::builder_with_provider(Arc::new(make(true)))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(ca.presenter(&[BOB], in_an_hour()));
        Arc::new(config)
    };
    let client = |suites| Arc::new(lax_client(suites, &rustls::version::TLS13));
    let agreed = |done: &Outcome| {
        let group = done.server.negotiated_key_exchange_group();
        group.map(|group| group.name())
    };
    for (client_suites, server) in [
        (make(true), Arc::clone(&strict_server)),
        (make(false), Arc::clone(&strict_server)),
        (make(true), ca.certificate(BOB).server_config()),
    ] {
        let done = handshake(client(client_suites), server);
        assert_eq!(agreed(&done), Some(NamedGroup::X25519MLKEM768));
    }
    let mut classical = make(false);
    classical.kx_groups = vec![everything::kx_group::X25519];
    let error = handshake(client(classical), strict_server).server_error();
    assert!(error.contains("NoKxGroupsInCommon"), "{error}");
}

/// A build says that it is validated if it is, and only then.
#[cfg(not(feature = "fips"))]
#[test]
fn an_ordinary_build_does_not_pass_for_a_validated_one() {
    use super::{FipsError, describe_provider, is_fips, require_fips};

    assert!(!is_fips() && !describe_provider().contains("FIPS"));
    assert_eq!(require_fips(), Err(FipsError::NotBuilt));
}

/// The validated module has neither ChaCha20 nor X25519 by itself: an end that has nothing else is refused, whichever it is,
/// and the others agree on what is approved.
#[cfg(feature = "fips")]
#[test]
fn a_fips_build_takes_approved_cryptography_only() {
    use super::{describe_provider, is_fips, require_fips};
    use everything::{cipher_suite, kx_group};
    use rustls::NamedGroup::{X25519MLKEM768, secp256r1, secp384r1};

    assert!(is_fips() && describe_provider().contains("FIPS"));
    assert_eq!(require_fips(), Ok(()));
    let ca = TestCa::new();
    let (alice, bob) = (ca.certificate(ALICE), ca.certificate(BOB));
    assert!(alice.client_config(&[id(BOB)]).fips() && bob.server_config().fips());
    let groups: std::collections::BTreeSet<u16> = provider()
        .kx_groups
        .iter()
        .map(|group| group.name().into())
        .collect();
    let approved = [secp256r1, secp384r1, X25519MLKEM768].map(u16::from);
    assert_eq!(groups, approved.into());
    let done = handshake(alice.client_config(&[id(BOB)]), bob.server_config());
    assert!(done.established());

    let with = |change: fn(&mut CryptoProvider)| {
        let mut suites = everything::default_provider();
        change(&mut suites);
        suites
    };
    for (other, why) in [
        (
            with(|it| it.cipher_suites = vec![cipher_suite::TLS13_CHACHA20_POLY1305_SHA256]),
            "NoCipherSuitesInCommon",
        ),
        (
            with(|it| it.kx_groups = vec![kx_group::X25519]),
            "NoKxGroupsInCommon",
        ),
    ] {
        let client = lax_client(other.clone(), &rustls::version::TLS13);
        let error = handshake(Arc::new(client), bob.server_config()).server_error();
        assert!(error.contains(why), "{error}");
        let server = ServerConfig::builder_with_provider(Arc::new(other))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(ca.presenter(&[BOB], in_an_hour()));
        let done = handshake(alice.client_config(&[id(BOB)]), Arc::new(server));
        assert!(done.server_error().contains(why));
        assert!(!done.established());
    }
}

#[test]
fn a_client_that_does_not_speak_h2_is_refused() {
    let ca = TestCa::new();
    let (alice, bob) = (ca.certificate(ALICE), ca.certificate(BOB));
    let mut client = ClientConfig::clone(&alice.client_config(&[id(BOB)]));
    client.alpn_protocols = vec![b"http/1.1".to_vec()];
    let error = handshake(Arc::new(client), bob.server_config()).server_error();
    assert!(error.contains("known protocol"), "{error}");
}

#[test]
fn a_certificate_must_prove_what_was_asked_for() {
    let ca = TestCa::new();
    let (leaf, key) = ca.leaf(&[BOB], in_an_hour());
    let roots = vec![ca.root.clone()];
    let error = WorkloadCertificate::new(id(ALICE), vec![leaf.clone()], key, roots.clone());
    let text = format!("asked for a certificate of {ALICE}, got one of {BOB}");
    assert_eq!(error.unwrap_err().to_string(), text);

    let (_, other_key) = ca.leaf(&[BOB], in_an_hour());
    let error = WorkloadCertificate::new(id(BOB), vec![leaf], other_key, roots);
    assert!(matches!(error, Err(CertificateError::Tls(..))), "{error:?}");

    assert_eq!(peer_identity(&[]), Err(PeerError::NoCertificate));
    let garbage = CertificateDer::from(vec![0x30, 0x03, 0x02, 0x01, 0x01]);
    assert!(matches!(
        peer_identity(&[garbage]),
        Err(PeerError::Unreadable(_))
    ));
}
