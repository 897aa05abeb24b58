//! How single values of `server.yaml` are written: addresses, devices, dtypes. Knows no setting by its name.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::bail;

use crate::model::load::{DeviceChoice, DtypeChoice};
use crate::nn::quant::Quantization;

pub(super) fn parse_host(text: &str) -> anyhow::Result<IpAddr> {
    if text == "localhost" {
        return Ok(Ipv4Addr::LOCALHOST.into());
    }
    let bare = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(text);
    bare.parse().map_err(|_| {
        anyhow::anyhow!("'{text}' is no IP address; use 127.0.0.1 (this machine only), or 0.0.0.0 or ::1")
    })
}

pub(super) fn parse_device(text: &str) -> anyhow::Result<DeviceChoice> {
    match text {
        "auto" => Ok(DeviceChoice::Auto),
        "cpu" => Ok(DeviceChoice::Cpu),
        "cuda" => Ok(DeviceChoice::Cuda(0)),
        _ => match text.strip_prefix("cuda:").map(str::parse) {
            Some(Ok(index)) => Ok(DeviceChoice::Cuda(index)),
            _ => bail!("'{text}' is no device; use auto, cpu, cuda or cuda:N with N the number of the card"),
        },
    }
}

pub(super) fn parse_dtype(text: &str) -> anyhow::Result<DtypeChoice> {
    match text {
        "auto" => Ok(DtypeChoice::Auto),
        "f32" => Ok(DtypeChoice::F32),
        "f16" => Ok(DtypeChoice::F16),
        "bf16" => Ok(DtypeChoice::Bf16),
        _ => bail!("'{text}' is no dtype; use auto, f32, f16 or bf16"),
    }
}

pub(super) fn parse_quantize(text: &str) -> anyhow::Result<Quantization> {
    match text {
        "none" => Ok(Quantization::None),
        "q8_0" => Ok(Quantization::Q8_0),
        "q4_0" => Ok(Quantization::Q4_0),
        "q4_k" => Ok(Quantization::Q4K),
        _ => bail!("'{text}' is no quantization; use none, q8_0, q4_0 or q4_k"),
    }
}
