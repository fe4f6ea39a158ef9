"""The paper's comparison: `arms` are trained by `runs`, `embedded` and `given` draw with what they became and measure it
(`perceptual`: real pictures), `resampling` puts intervals to the measures, `claims` says what they mean."""
