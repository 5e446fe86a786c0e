package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestKeyGenerateMakesAKeyOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	generate := func(args ...string) (code int, stdout, stderr string) {
		var out, errs bytes.Buffer
		code = run(t.Context(), append([]string{"key", "generate"}, args...), strings.NewReader(""), &out, &errs)
		return code, out.String(), errs.String()
	}
	code, stdout, stderr := generate(path)
	if code != exitDone || stdout != "file://"+path+"\n" || !strings.Contains(stderr, "copy") {
		t.Fatalf("exit %d, %q, %q", code, stdout, stderr)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(stdout+stderr, strings.Fields(string(before))[len(strings.Fields(string(before)))-3]) {
		t.Error("the key itself is printed")
	}
	code, stdout, stderr = generate(path)
	if code != exitRefused || stdout != "" || !strings.Contains(stderr, path) {
		t.Errorf("again: exit %d, %q, %q", code, stdout, stderr)
	}
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(after, before) {
		t.Errorf("the refusal changed the key (%v)", err)
	}
	code, stdout, stderr = generate("--json", path+"2")
	var made struct{ KeyUri, KeyId string }
	if err := json.Unmarshal([]byte(stdout), &made); err != nil || code != exitDone || made.KeyUri != "file://"+path+"2" || len(made.KeyId) != 32 {
		t.Errorf("--json: exit %d, %q, %q (%v)", code, stdout, stderr, err)
	}
	for _, args := range [][]string{{}, {""}, {"a", "b"}, {"file://" + path + "3"}} {
		if code, stdout, stderr = generate(args...); code != exitUsage || stdout != "" {
			t.Errorf("%q: exit %d, %q, %q", args, code, stdout, stderr)
		}
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 2 {
		t.Errorf("there are %v (%v), want the two keys", entries, err)
	}
}
