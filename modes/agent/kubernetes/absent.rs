//! In place of the source, in a build without it: there never is one.

use std::sync::Arc;

use super::super::{Agent, EnrolError};
use super::{Settings, Wanted};
use crate::cni::PodEvent;

/// No value of this type exists.
#[derive(Debug)]
pub(in crate::agent) enum Source {}

impl Source {
    pub(in crate::agent) async fn new(
        _: &Settings,
        _: crate::options::Mode,
    ) -> anyhow::Result<Self> {
        anyhow::bail!(
            "--source kubernetes: this program was built without it (cargo feature `kubernetes`)"
        )
    }

    pub(in crate::agent) fn start(&self, _: &Arc<Agent>) -> Vec<tokio::task::JoinHandle<()>> {
        match *self {}
    }

    pub(in crate::agent) async fn wanted(
        &self,
        _: &PodEvent,
    ) -> Result<Option<Wanted>, EnrolError> {
        match *self {}
    }

    pub(in crate::agent) fn ready(&self) -> Result<(), String> {
        match *self {}
    }

    pub(in crate::agent) fn is_connected(&self) -> bool {
        match *self {}
    }
}
