//! A trainer as its caller holds it: an asynchronous handle whose methods are commands to the engine.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::oneshot;

use super::command::{Command, Reply, TrainerId};
use super::training::{
    PassKind, PassReport, StepParameters, StepReport, TrainBatch, TrainerSnapshot, TrainerSpec, TrainingPlan,
};
use super::{AdapterHandle, EngineError, EngineHandle};
use crate::nn::lora::LoraWeights;

impl EngineHandle {
    /// What training like this would take, and the choices that make it fit.
    ///
    /// # Errors
    /// A field out of its range; [`EngineError::TrainingMemory`] where nothing fits.
    pub async fn plan_training(&self, spec: TrainerSpec) -> Result<TrainingPlan, EngineError> {
        self.ask(|reply| Command::PlanTraining(Box::new(spec), reply)).await
    }

    /// Takes the memory for a trainer and initialises its weights: A as PEFT does (Kaiming uniform) from the
    /// seed, B zero.
    ///
    /// # Errors
    /// As [`EngineHandle::plan_training`].
    pub async fn create_trainer(&self, spec: TrainerSpec) -> Result<Trainer, EngineError> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let kept = spec.clone();
        // Whoever stops waiting drops the guard, and with it the trainer that the engine may have made.
        let guard = Guard { id, engine: self.clone() };
        let plan = self.ask(|reply| Command::CreateTrainer(id, Box::new(spec), reply)).await?;
        Ok(Trainer { guard, plan, spec: kept })
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, EngineError> {
        let (reply, answer) = oneshot::channel();
        self.send(command(reply))?;
        answer.await.map_err(|_| EngineError::Stopped)?
    }
}

struct Guard {
    id: TrainerId,
    engine: EngineHandle,
}

impl Drop for Guard {
    fn drop(&mut self) {
        // An engine that has stopped has dropped its trainers.
        let _ = self.engine.send(Command::DropTrainer(self.id));
    }
}

/// A trainer in the engine. Dropping it frees its memory there.
pub struct Trainer {
    guard: Guard,
    plan: TrainingPlan,
    spec: TrainerSpec,
}

impl Trainer {
    /// The plan that it was accepted with.
    pub fn plan(&self) -> &TrainingPlan {
        &self.plan
    }

    /// What was asked for.
    pub fn spec(&self) -> &TrainerSpec {
        &self.spec
    }

    /// Forward and backward pass over a batch; the gradient is added to that of the passes since the last step.
    ///
    /// # Errors
    /// More tokens than planned, no weight but 0, an unknown token; what the device reports.
    pub async fn forward_backward(&self, batch: TrainBatch) -> Result<PassReport, EngineError> {
        self.pass(batch, PassKind::Learn).await
    }

    /// Loss and log-probabilities without a gradient and without dropout.
    ///
    /// # Errors
    /// As [`Trainer::forward_backward`].
    pub async fn evaluate(&self, batch: TrainBatch) -> Result<PassReport, EngineError> {
        self.pass(batch, PassKind::Evaluate).await
    }

    /// The same of the base model, as if there were no adapter: one copy of the weights serves as its own reference.
    ///
    /// # Errors
    /// As [`Trainer::forward_backward`].
    pub async fn evaluate_base(&self, batch: TrainBatch) -> Result<PassReport, EngineError> {
        self.pass(batch, PassKind::EvaluateBase).await
    }

    async fn pass(&self, batch: TrainBatch, kind: PassKind) -> Result<PassReport, EngineError> {
        self.ask(|reply| Command::Pass(self.guard.id, Box::new(batch), kind, reply)).await
    }

    /// Divides the gradient by the sum of the normalizers since the last step, clips it and takes an AdamW step.
    ///
    /// # Errors
    /// No pass since the last step; what the device reports.
    pub async fn optim_step(&self, parameters: StepParameters) -> Result<StepReport, EngineError> {
        self.ask(|reply| Command::OptimStep(self.guard.id, parameters, reply)).await
    }

    /// Forgets the gradient of the passes since the last step, as if they had not been.
    ///
    /// # Errors
    /// What the device reports.
    pub async fn discard_gradient(&self) -> Result<(), EngineError> {
        self.ask(|reply| Command::DiscardGradient(self.guard.id, reply)).await
    }

    /// Copies everything out, between two steps.
    ///
    /// # Errors
    /// A pass since the last step, whose gradient a snapshot would lose; what the device reports.
    pub async fn snapshot(&self) -> Result<TrainerSnapshot, EngineError> {
        self.ask(|reply| Command::Snapshot(self.guard.id, reply)).await
    }

    /// Puts everything back; what follows has the bits that it would have had after the snapshot.
    ///
    /// # Errors
    /// Tensors that are missing or have other shapes.
    pub async fn restore(&self, snapshot: TrainerSnapshot) -> Result<(), EngineError> {
        self.ask(|reply| Command::Restore(self.guard.id, Box::new(snapshot), reply)).await
    }

    /// Copies the adapter out as it is now.
    ///
    /// # Errors
    /// What the device reports.
    pub async fn weights(&self) -> Result<LoraWeights, EngineError> {
        self.ask(|reply| Command::TrainedWeights(self.guard.id, reply)).await
    }

    /// Serves the weights as they are now, with no file between; see [`super::EngineHandle::load_adapter`].
    ///
    /// # Errors
    /// A budget that is pinned by running requests.
    pub async fn publish(&self, name: &str, generation: u64) -> Result<AdapterHandle, EngineError> {
        self.ask(|reply| Command::Publish(self.guard.id, name.to_owned(), generation, reply)).await
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, EngineError> {
        self.guard.engine.ask(command).await
    }
}
