//! The adapters that requests can name: read when first named, read again when their files change, forgotten
//! when they are deleted, replaced when training publishes one. Which of them stay on the device is the engine's decision; this file remembers each
//! by a weak handle, so that it never pins one.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};

use tracing::{Instrument as _, Span};

use super::files::{self, Manifest, Stamp};
use super::{AdapterError, AdapterInfo, TrainedAdapter, check_name, place, quota};
use crate::engine::command::AdapterKey;
use crate::engine::training::LoraSpec;
use crate::engine::{AdapterHandle, EngineError, EngineHandle, LoadAdapter};
use crate::nn::lora::LoraWeights;

/// The folder of adapters and what of it the engine was given. A cheap clone.
#[derive(Clone)]
pub struct Registry {
    shared: Arc<Shared>,
}

struct Shared {
    dir: PathBuf,
    engine: EngineHandle,
    /// Bytes that the folder may have; `None` is without a bound.
    quota_bytes: Option<u64>,
    /// One entry for each name that was ever there, so that generations go on growing after a deletion.
    slots: Mutex<HashMap<String, Arc<Slot>>>,
    /// Held alone between the two renames of a replacement, so that no reader finds the name gone. Guards no
    /// memory, so a holder's panic leaves nothing torn.
    replacing: RwLock<()>,
}

/// A published adapter.
#[derive(Debug)]
pub struct Published {
    /// The generation that it has from now on.
    pub generation: u64,
    /// Its folder.
    pub path: PathBuf,
    /// Why the engine does not hold it yet, if it does not; the next request that names it loads its files.
    pub not_resident: Option<EngineError>,
}

/// One name.
#[derive(Default)]
struct Slot {
    /// Held while the adapter is read, loaded or deleted: of many requests that name it at once, one does the
    /// work.
    turn: tokio::sync::Mutex<()>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    generation: u64,
    /// The state of the files that `generation` stands for.
    stamp: Option<Stamp>,
    /// Alive while the engine or a request holds the adapter.
    resident: Weak<AdapterKey>,
    /// Weights that are served without files of their own; pinned, as there is nothing to load them from again.
    live: Option<AdapterHandle>,
    /// What a full read found wrong with these files, where their names and shapes do not show it.
    broken: Option<(Stamp, String)>,
}

impl Registry {
    /// A registry over `dir`, which need not exist yet. Touches nothing but the remains of deletions and
    /// replacements that a crash interrupted.
    pub fn new(dir: PathBuf, engine: EngineHandle) -> Self {
        Self::with_quota(dir, engine, None)
    }

    /// The same, with a bound on the bytes that training may bring the folder to. Nothing is ever deleted for it.
    pub fn with_quota(dir: PathBuf, engine: EngineHandle, quota_bytes: Option<u64>) -> Self {
        place::recover(&dir);
        let (slots, replacing) = (Mutex::default(), RwLock::default());
        Self { shared: Arc::new(Shared { dir, engine, quota_bytes, slots, replacing }) }
    }

    /// Whether an adapter that is trained like this will have room under the quota.
    ///
    /// # Errors
    /// [`AdapterError::Quota`] with the figures and the remedy; a folder that cannot be measured.
    pub async fn check_room(&self, name: &str, lora: &LoraSpec) -> Result<(), AdapterError> {
        let (registry, name, lora) = (self.clone(), name.to_owned(), lora.clone());
        blocking(move || registry.check_room_now(&name, &lora)).await
    }

    fn check_room_now(&self, name: &str, lora: &LoraSpec) -> Result<(), AdapterError> {
        let Some(quota_bytes) = self.shared.quota_bytes else { return Ok(()) };
        let planned = quota::planned_bytes(lora, &self.shared.engine.info().sites);
        quota::check(&self.shared.dir, name, planned, quota_bytes)
    }

    /// The adapter of this name, on the device. It stays there, as it is now, for as long as the handle lives.
    ///
    /// # Errors
    /// A name against the rule, no such adapter, files that do not fit the model, no memory for it.
    pub async fn acquire(&self, name: &str) -> Result<AdapterHandle, AdapterError> {
        check_name(name)?;
        let (registry, name) = (self.clone(), name.to_owned());
        // A client that leaves must not cut the work in half: others wait for the same adapter.
        let acquire = async move { registry.acquire_now(&name).await };
        let handle = unless_panicked(tokio::spawn(acquire.in_current_span()).await)?;
        // Everything that the request or the job logs from here on names what it runs with.
        Span::current().record("adapter", &handle.name).record("generation", handle.generation);
        Ok(handle)
    }

    /// Every adapter in the folder, by name, those that cannot be used with the reason.
    ///
    /// # Errors
    /// [`AdapterError::Io`] when the folder cannot be listed.
    pub async fn list(&self) -> Result<Vec<AdapterInfo>, AdapterError> {
        let registry = self.clone();
        blocking(move || {
            let _whole = registry.shared.replacing.read().unwrap_or_else(PoisonError::into_inner);
            let all = files::describe_all(&registry.shared.dir, &registry.shared.engine.info().sites);
            let all = all.map_err(|e| AdapterError::io("the folder of adapters could not be listed", &e))?;
            Ok(all.into_iter().map(|(info, stamp)| registry.with_state(info, stamp.as_ref())).collect())
        })
        .await
    }

    /// One adapter, with the reason where it cannot be used.
    ///
    /// # Errors
    /// A name against the rule, no such adapter.
    pub async fn get(&self, name: &str) -> Result<AdapterInfo, AdapterError> {
        check_name(name)?;
        let (registry, name) = (self.clone(), name.to_owned());
        blocking(move || {
            let sites = &registry.shared.engine.info().sites;
            let _whole = registry.shared.replacing.read().unwrap_or_else(PoisonError::into_inner);
            let (info, stamp) = files::describe(&registry.shared.dir, &name, sites)?;
            Ok(registry.with_state(info, stamp.as_ref()))
        })
        .await
    }

    /// Removes an adapter from the disk and from the engine. Requests that run with it end as they began.
    ///
    /// # Errors
    /// A name against the rule, no such adapter, a disk that refuses.
    pub async fn delete(&self, name: &str) -> Result<(), AdapterError> {
        check_name(name)?;
        let (registry, name) = (self.clone(), name.to_owned());
        unless_panicked(tokio::spawn(async move { registry.delete_now(name).await }.in_current_span()).await)
    }

    /// Writes a trained adapter into the folder, whatever has its name until now, and has it served from the
    /// trainer's own weights: `serve` gets the generation and gives the handle. Requests that run with an older
    /// generation keep it.
    ///
    /// # Errors
    /// A name against the rule, a disk that refuses; what had the name still has it then. An engine that has no
    /// room at this moment is no error: see [`Published::not_resident`].
    pub async fn publish<F>(
        &self,
        name: &str,
        adapter: TrainedAdapter,
        training_job: &str,
        metrics: serde_json::Value,
        serve: impl FnOnce(u64) -> F + Send + 'static,
    ) -> Result<Published, AdapterError>
    where
        F: Future<Output = Result<AdapterHandle, EngineError>> + Send,
    {
        check_name(name)?;
        let (registry, name) = (self.clone(), name.to_owned());
        let notes = Manifest {
            training_job: Some(training_job.to_owned()),
            metrics: Some(metrics),
            ..Manifest::default()
        };
        let publish = async move { registry.publish_now(name, adapter, notes, serve).await };
        let published = unless_panicked(tokio::spawn(publish.in_current_span()).await)?;
        Span::current().record("generation", published.generation);
        Ok(published)
    }

    /// Has a trainer's weights served under a name as they are now, with no file: `serve` gets the generation and gives
    /// the handle. They go before whatever files the name has, until the next publication or [`Registry::withdraw`];
    /// the end of the process forgets them. Requests that run with an older generation keep it.
    ///
    /// # Errors
    /// A name against the rule; no room in the engine. What was served until then is served still.
    pub async fn publish_live<F>(
        &self,
        name: &str,
        serve: impl FnOnce(u64) -> F + Send + 'static,
    ) -> Result<AdapterHandle, AdapterError>
    where
        F: Future<Output = Result<AdapterHandle, EngineError>> + Send,
    {
        check_name(name)?;
        let (registry, name) = (self.clone(), name.to_owned());
        let publish = async move { registry.publish_live_now(name, serve).await };
        unless_panicked(tokio::spawn(publish.in_current_span()).await)
    }

    async fn publish_live_now<F>(
        &self,
        name: String,
        serve: impl FnOnce(u64) -> F,
    ) -> Result<AdapterHandle, AdapterError>
    where
        F: Future<Output = Result<AdapterHandle, EngineError>>,
    {
        let slot = self.new_slot(&name);
        let _turn = slot.turn.lock().await;
        let (registry, owned, same_slot) = (self.clone(), name.clone(), slot.clone());
        let generation = blocking(move || Ok(registry.next_generation(&owned, &same_slot))).await?;
        let handle = serve(generation).await?;
        let (live, resident) = {
            let mut state = slot.lock();
            state.generation = generation;
            // Whatever files there are, they are not this generation.
            state.stamp = None;
            let before = std::mem::replace(&mut state.resident, Arc::downgrade(&handle));
            (state.live.replace(handle.clone()), before.upgrade())
        };
        if let Some(old) = live.or(resident) {
            self.shared.engine.unload_adapter(old).await?;
        }
        tracing::debug!(adapter = name, generation, "adapter published without files");
        Ok(handle)
    }

    /// Ends what [`Registry::publish_live`] began, if it has not ended: the name means its files again, or nothing.
    ///
    /// # Errors
    /// A name against the rule; an engine that has stopped.
    pub async fn withdraw(&self, name: &str) -> Result<(), AdapterError> {
        check_name(name)?;
        let Some(slot) = self.slot(name) else { return Ok(()) };
        let _turn = slot.turn.lock().await;
        let live = slot.lock().live.take();
        match live {
            Some(handle) => Ok(self.shared.engine.unload_adapter(handle).await?),
            None => Ok(()),
        }
    }

    /// The weights in the files of this name.
    ///
    /// # Errors
    /// A name against the rule, no such adapter, files that do not fit the model.
    pub async fn read(&self, name: &str) -> Result<LoraWeights, AdapterError> {
        check_name(name)?;
        let (registry, name) = (self.clone(), name.to_owned());
        blocking(move || {
            let _whole = registry.shared.replacing.read().unwrap_or_else(PoisonError::into_inner);
            super::read(&registry.shared.dir, &name, &registry.shared.engine.info().sites)
        })
        .await
    }

    /// One more than any that the name had. What lies there counts as a generation, whether or not it was ever used,
    /// and even if it is broken.
    fn next_generation(&self, name: &str, slot: &Slot) -> u64 {
        let present = files::locate(&self.shared.dir, name).and_then(|located| {
            let stamp = located.stamp(name)?;
            Ok((located.published(name, &stamp), stamp))
        });
        1 + match &present {
            Ok((published, stamp)) => slot.lock().generation_for(stamp, *published),
            Err(_) => slot.lock().generation,
        }
    }

    async fn publish_now<F>(
        &self,
        name: String,
        adapter: TrainedAdapter,
        mut notes: Manifest,
        serve: impl FnOnce(u64) -> F,
    ) -> Result<Published, AdapterError>
    where
        F: Future<Output = Result<AdapterHandle, EngineError>>,
    {
        let slot = self.new_slot(&name);
        let _turn = slot.turn.lock().await;
        let (registry, owned, same_slot) = (self.clone(), name.clone(), slot.clone());
        let (generation, stamp) = blocking(move || {
            let dir = &registry.shared.dir;
            // Other jobs may have filled the folder since this one was accepted.
            registry.check_room_now(&owned, &adapter.lora)?;
            let generation = registry.next_generation(&owned, &same_slot);
            notes.generation = Some(generation);
            let fill = |folder: &std::path::Path| {
                adapter.write(folder, &registry.shared.engine.info().sites)?;
                files::write_manifest(folder, notes)
            };
            let around = |rename: &mut dyn FnMut() -> std::io::Result<()>| {
                let _alone = registry.shared.replacing.write().unwrap_or_else(PoisonError::into_inner);
                rename()
            };
            place::put(dir, &owned, fill, around)
                .map_err(|e| AdapterError::io(format!("the adapter {owned:?} could not be written"), &e))?;
            Ok((generation, files::locate(dir, &owned)?.stamp(&owned)?))
        })
        .await?;
        let served = serve(generation).await;
        let before = {
            let mut state = slot.lock();
            state.generation = generation;
            state.stamp = Some(stamp);
            state.broken = None;
            let now = served.as_ref().map_or_else(|_| Weak::new(), Arc::downgrade);
            let resident = std::mem::replace(&mut state.resident, now).upgrade();
            state.live.take().or(resident)
        };
        if let Some(old) = before {
            self.shared.engine.unload_adapter(old).await?;
        }
        tracing::info!(adapter = name, generation, "adapter published");
        Ok(Published { generation, path: self.shared.dir.join(&name), not_resident: served.err() })
    }

    async fn acquire_now(&self, name: &str) -> Result<AdapterHandle, AdapterError> {
        let slot = match self.slot(name) {
            Some(slot) => slot,
            // Only what exists gets a slot, so that names out of the air do not fill the memory.
            None => {
                let (registry, owned) = (self.clone(), name.to_owned());
                let exists = move || {
                    let _whole = registry.shared.replacing.read().unwrap_or_else(PoisonError::into_inner);
                    files::exists(&registry.shared.dir, &owned)
                };
                if !blocking(exists).await? {
                    return Err(AdapterError::NotFound { name: name.to_owned() });
                }
                self.new_slot(name)
            }
        };
        let _turn = slot.turn.lock().await;
        if let Some(handle) = slot.lock().live.clone() {
            return Ok(handle);
        }
        let outcome = self.refresh(name, &slot).await;
        if let Err(AdapterError::NotFound { .. }) = outcome {
            // Somebody removed the folder by hand; the memory should not stay taken for it.
            self.forget(&slot).await?;
        }
        outcome
    }

    /// Hands out what is resident if the files are still the same, else loads them. The caller has the turn.
    async fn refresh(&self, name: &str, slot: &Slot) -> Result<AdapterHandle, AdapterError> {
        let (dir, owned) = (self.shared.dir.clone(), name.to_owned());
        let (located, stamp) = blocking(move || {
            let located = files::locate(&dir, &owned)?;
            let stamp = located.stamp(&owned)?;
            Ok((located, stamp))
        })
        .await?;
        if let Some(handle) = slot.lock().resident_as(&stamp) {
            return Ok(handle);
        }
        let (engine, owned) = (self.shared.engine.clone(), name.to_owned());
        let read = blocking(move || {
            let (stamp, loaded) = located.load(&owned, &engine.info().sites)?;
            let published = located.published(&owned, &stamp);
            Ok((stamp, loaded, published))
        });
        let (stamp, loaded, published) = match read.await {
            Ok(read) => read,
            Err(error) => {
                if let AdapterError::Invalid { reason, .. } = &error {
                    slot.lock().broken = Some((stamp, reason.clone()));
                }
                return Err(error);
            }
        };
        if !loaded.unknown_fields.is_empty() {
            let fields = loaded.unknown_fields.join(", ");
            tracing::warn!(adapter = name, fields, "adapter_config.json sets fields that are not known here");
        }
        let generation = slot.lock().generation_for(&stamp, published);
        let weights = loaded.weights;
        let load = LoadAdapter { name: name.to_owned(), generation, weights };
        let handle = self.shared.engine.load_adapter(load).await.map_err(|error| match error {
            EngineError::AdapterInvalid(reason) => AdapterError::Invalid { name: name.to_owned(), reason },
            other => AdapterError::Engine(other),
        })?;
        let before = {
            let mut state = slot.lock();
            state.generation = generation;
            state.stamp = Some(stamp);
            state.broken = None;
            std::mem::replace(&mut state.resident, Arc::downgrade(&handle))
        };
        if let Some(old) = before.upgrade() {
            // Requests that run with it keep it; nobody new can reach it.
            self.shared.engine.unload_adapter(old).await?;
        }
        tracing::info!(adapter = name, generation, "adapter loaded");
        Ok(handle)
    }

    async fn delete_now(&self, name: String) -> Result<(), AdapterError> {
        let slot = self.slot(&name);
        let _turn = match &slot {
            Some(slot) => Some(slot.turn.lock().await),
            None => None,
        };
        let (dir, owned) = (self.shared.dir.clone(), name.clone());
        blocking(move || files::remove(&dir, &owned)).await?;
        if let Some(slot) = &slot {
            self.forget(slot).await?;
        }
        tracing::info!(adapter = name, "adapter deleted");
        Ok(())
    }

    /// Takes the slot's adapter off the device; its generation stays, so that the next one is another.
    async fn forget(&self, slot: &Slot) -> Result<(), AdapterError> {
        let before = {
            let mut state = slot.lock();
            state.stamp = None;
            state.broken = None;
            let resident = std::mem::take(&mut state.resident).upgrade();
            state.live.take().or(resident)
        };
        match before {
            Some(handle) => Ok(self.shared.engine.unload_adapter(handle).await?),
            None => Ok(()),
        }
    }

    fn with_state(&self, mut info: AdapterInfo, stamp: Option<&Stamp>) -> AdapterInfo {
        if let Some(slot) = self.slot(&info.name) {
            let state = slot.lock();
            if state.generation > 0 {
                info.generation = Some(state.generation);
            }
            info.resident = state.resident.strong_count() > 0;
            if let (None, Some(stamp), Some((of, reason))) = (&info.error, stamp, &state.broken)
                && of == stamp
            {
                info.error = Some(AdapterError::invalid(&info.name, reason.as_str()).to_string());
            }
        }
        info
    }

    fn slot(&self, name: &str) -> Option<Arc<Slot>> {
        self.slots().get(name).cloned()
    }

    fn new_slot(&self, name: &str) -> Arc<Slot> {
        self.slots().entry(name.to_owned()).or_default().clone()
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<String, Arc<Slot>>> {
        self.shared.slots.lock().expect("no holder of the slots lock panics")
    }
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of a slot's lock panics")
    }
}

impl State {
    /// The resident adapter, if it was made from these very files. The upgrade pins it.
    fn resident_as(&self, stamp: &Stamp) -> Option<AdapterHandle> {
        (self.stamp.as_ref() == Some(stamp)).then(|| self.resident.upgrade()).flatten()
    }

    /// The same generation for files that had only been evicted, the one they were published under if that was
    /// before this process or in another, the next one for others.
    fn generation_for(&self, stamp: &Stamp, published: Option<files::Published>) -> u64 {
        match published {
            _ if self.stamp.as_ref() == Some(stamp) => self.generation,
            Some(files::Published { generation, untouched: true }) if generation > self.generation => {
                generation
            }
            Some(files::Published { generation, .. }) => generation.max(self.generation) + 1,
            None => self.generation + 1,
        }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, AdapterError> + Send + 'static,
) -> Result<T, AdapterError> {
    let span = Span::current();
    unless_panicked(tokio::task::spawn_blocking(move || span.in_scope(work)).await)
}

/// Carries a panic of the task on to the caller. A task that never ran belongs to a runtime that is shutting
/// down.
fn unless_panicked<T>(
    joined: Result<Result<T, AdapterError>, tokio::task::JoinError>,
) -> Result<T, AdapterError> {
    match joined {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(AdapterError::Engine(EngineError::Stopped)),
    }
}
