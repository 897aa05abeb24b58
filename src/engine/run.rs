//! The engine thread.

use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, mpsc};

use super::command::Command;
use super::{EngineConfig, EngineStats, ModelInfo};
use crate::model::tokenizer::Tokenizer;

pub(super) fn thread(
    _config: EngineConfig,
    _tokenizer: Arc<Tokenizer>,
    _inbox: mpsc::Receiver<Command>,
    _ready: mpsc::Sender<anyhow::Result<ModelInfo>>,
    _in_flight: Arc<AtomicUsize>,
    _stats: Arc<Mutex<EngineStats>>,
) {
}
