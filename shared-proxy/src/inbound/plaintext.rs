//! Plaintext connections to captured pods (15006).

use std::time::Instant;

use super::{Arrival, Arrived, Claims, arrive};
use crate::capture::{Captured, ClientAddr, OrigDstAddr, Role};
use crate::core::{Attachment, Failure};
use crate::drain::Signal;
use crate::hbone::authority::Authority;
use crate::relay::{self, Leg};
use crate::telemetry::{Direction, Step};

/// Serves one connection to its end.
pub(crate) async fn serve(attachment: Attachment, captured: Captured, signal: Signal) {
    let Captured {
        stream,
        client,
        dst,
    } = captured;
    let leg = Leg::new(stream);
    let began = Instant::now();
    let prepared = tokio::select! {
        prepared = Box::pin(prepare(&attachment, client, dst, &signal)) => prepared,
        () = signal.cut() => return,
    };
    let Some(arrived) = prepared else {
        return;
    };
    let Arrived {
        record,
        application,
        admitted,
        ..
    } = arrived;
    attachment.took(Step::Total, Direction::Inbound, began);
    let result = tokio::select! {
        result = relay::between_tcp(leg, application, &record) => result.map_err(Failure::from),
        () = signal.cut() => Err(admitted.cut()),
    };
    record.finish(result.map_err(Into::into));
}

async fn prepare(
    attachment: &Attachment,
    client: ClientAddr,
    dst: Result<OrigDstAddr, crate::capture::Refusal>,
    signal: &Signal,
) -> Option<Arrived> {
    let known = dst.as_ref().ok().copied();
    let owned = dst.and_then(|dst| {
        let pod = attachment
            .scope
            .owner(Role::InboundPlaintext, client, dst)?;
        Ok((pod, dst))
    });
    let (pod, dst) = match owned {
        Ok(owned) => owned,
        Err(refusal) => {
            attachment.core.telemetry.refused(
                Direction::Inbound,
                attachment.scope.id().capture_mode,
                client,
                known,
                &refusal.into(),
            );
            return None;
        }
    };
    let arrival = Arrival {
        client,
        addr: dst.0,
        authority: &Authority::Address(dst.0),
        peer: None,
        tunnelled: false,
        claims: Claims::default(),
    };
    // A failure has been accounted for where it happened.
    arrive(attachment, &arrival, &pod, signal).await.ok()
}
