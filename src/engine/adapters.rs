//! Adapters that are resident on the device, within a byte budget. Knows no files: whoever loads one gives its
//! weights, and whoever uses one holds its handle.

use std::sync::Arc;

use super::EngineError;
use super::command::{AdapterHandle, AdapterKey, LoadAdapter};
use crate::model::decoder::Decoder;
use crate::nn::lora::Adapter;

/// The table of resident adapters.
pub(super) struct Adapters {
    budget_bytes: u64,
    residents: Vec<Resident>,
    /// Grows with every use; the smallest is the least recently used.
    clock: u64,
}

struct Resident {
    key: AdapterHandle,
    adapter: Arc<Adapter>,
    bytes: u64,
    last_used: u64,
    /// No new request finds it; it goes when nobody holds it.
    retired: bool,
}

impl Adapters {
    pub(super) fn new(budget_bytes: u64) -> Self {
        Self { budget_bytes, residents: Vec::new(), clock: 0 }
    }

    /// Makes room, then lays the weights out on the device.
    pub(super) fn load(
        &mut self,
        adapter: LoadAdapter,
        model: &Decoder,
    ) -> Result<AdapterHandle, EngineError> {
        let bytes = adapter.weights.bytes();
        for old in self.residents.iter_mut().filter(|r| r.key.name == adapter.name) {
            old.retired = true;
        }
        self.sweep();
        while self.bytes() + bytes > self.budget_bytes {
            if !self.evict_oldest() {
                return Err(EngineError::AdapterMemory {
                    needed_bytes: bytes,
                    budget_bytes: self.budget_bytes,
                    pinned_bytes: self.bytes(),
                });
            }
        }
        let bound = Adapter::bind(&adapter.weights, model.sites(), |s| model.site_weight(s), model.device())
            .map_err(|error| EngineError::AdapterInvalid(error.to_string()))?;
        let key = AdapterKey::new(adapter.name, adapter.generation);
        self.clock += 1;
        self.residents.push(Resident {
            key: key.clone(),
            adapter: Arc::new(bound),
            bytes,
            last_used: self.clock,
            retired: false,
        });
        Ok(key)
    }

    /// The weights behind a handle. A handle that is held is always resident.
    pub(super) fn get(&mut self, key: &AdapterHandle) -> Option<Arc<Adapter>> {
        self.clock += 1;
        let resident = self.residents.iter_mut().find(|r| r.key.serial() == key.serial())?;
        resident.last_used = self.clock;
        Some(resident.adapter.clone())
    }

    /// Lets an adapter go as soon as nobody holds it.
    pub(super) fn unload(&mut self, key: AdapterHandle) {
        for resident in self.residents.iter_mut().filter(|r| r.key.serial() == key.serial()) {
            resident.retired = true;
        }
        drop(key);
        self.sweep();
    }

    /// Name, generation and bytes of each.
    pub(super) fn list(&self) -> Vec<(String, u64, u64)> {
        self.residents.iter().map(|r| (r.key.name.clone(), r.key.generation, r.bytes)).collect()
    }

    /// Lets the adapter go that was unused for longest; false when all are held.
    fn evict_oldest(&mut self) -> bool {
        self.residents.sort_by_key(|r| r.last_used);
        (0..self.residents.len()).any(|at| self.release(at))
    }

    /// Lets go of what no new request finds and nobody holds.
    fn sweep(&mut self) {
        for at in (0..self.residents.len()).rev() {
            if self.residents[at].retired {
                self.release(at);
            }
        }
    }

    /// Removes a resident unless somebody holds its handle. The handle itself decides, in one atomic step:
    /// whoever keeps a weak one either gets it in time or finds it gone.
    fn release(&mut self, at: usize) -> bool {
        let resident = self.residents.remove(at);
        match Arc::try_unwrap(resident.key) {
            Ok(_) => true,
            Err(key) => {
                self.residents.insert(at, Resident { key, ..resident });
                false
            }
        }
    }

    fn bytes(&self) -> u64 {
        self.residents.iter().map(|r| r.bytes).sum()
    }
}
