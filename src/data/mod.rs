//! Files from where they lie. Today: the files of a model, from a folder or from a hub. What is inside the files
//! is not known here.

pub mod hub;
