"""Operations under dopsd_fast: one module per op, and `_native`, the C++ part. Import the module you need from here."""
