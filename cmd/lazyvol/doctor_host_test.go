package main

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestDoctorJudgesAHost(t *testing.T) {
	const gib = 1 << 30
	helper := helperFacts{path: "/bin/fusermount3", setuid: true}
	with := func(f helperFacts, change func(*helperFacts)) finding {
		change(&f)
		return judgeHelper(f)
	}
	conf := confFacts{mountMax: defaultMountMax}
	checkJudged(t, map[string]judged{
		"new kernel":         {judgeKernel("6.18.44-fc"), levelOK, "6.18"},
		"first kernel":       {judgeKernel("5.8.0"), levelOK, ""},
		"old kernel":         {judgeKernel("5.7.19"), levelWarning, "attach"},
		"very old kernel":    {judgeKernel("4.19.0-rc1"), levelWarning, "5.8"},
		"kernel of no kind":  {judgeKernel("unknown"), levelWarning, "unknown"},
		"fuse":               {judgeFuse(fuseFacts{}), levelOK, "/dev/fuse"},
		"no fuse":            {judgeFuse(fuseFacts{open: unix.ENOENT}), levelFailed, "modprobe fuse"},
		"fuse not loaded":    {judgeFuse(fuseFacts{open: unix.ENODEV, root: true}), levelFailed, "modprobe fuse"},
		"fuse for root only": {judgeFuse(fuseFacts{open: unix.EACCES}), levelFailed, "chmod 666"},
		"fuse in a cage":     {judgeFuse(fuseFacts{open: unix.EPERM, root: true}), levelFailed, "DeviceAllow"},
		"fuse otherwise":     {judgeFuse(fuseFacts{open: unix.EIO}), levelFailed, "input/output"},

		"helper":                {judgeHelper(helper), levelOK, "setuid"},
		"helper of root":        {with(helper, func(f *helperFacts) { f.root = true }), levelSkipped, "root"},
		"no helper of root":     {with(helper, func(f *helperFacts) { f.root, f.missing = true, os.ErrNotExist }), levelSkipped, "not installed"},
		"helper useless to all": {with(helper, func(f *helperFacts) { f.root, f.setuid = true, false }), levelSkipped, "not setuid"},
		"no helper":             {with(helper, func(f *helperFacts) { f.missing = os.ErrNotExist }), levelFailed, "fuse3"},
		"helper not setuid":     {with(helper, func(f *helperFacts) { f.setuid = false }), levelFailed, "chmod u+s /bin/fusermount3"},
		"capable helper":        {with(helper, func(f *helperFacts) { f.setuid, f.capabilitySet = false, true }), levelOK, ""},
		"helper on nosuid":      {with(helper, func(f *helperFacts) { f.nosuid = true }), levelFailed, "nosuid"},
		"no new privileges":     {with(helper, func(f *helperFacts) { f.noPrivileges = true }), levelFailed, "NoNewPrivileges"},

		"others":             {judgeAllowOther(confFacts{allowOther: true}), levelOK, ""},
		"no others":          {judgeAllowOther(confFacts{}), levelWarning, "user_allow_other"},
		"no fuse.conf":       {judgeAllowOther(confFacts{missing: true}), levelWarning, "user_allow_other"},
		"fuse.conf unread":   {judgeAllowOther(confFacts{unreadable: unix.EACCES}), levelWarning, "denied"},
		"others of root":     {judgeAllowOther(confFacts{root: true}), levelSkipped, "root"},
		"limits":             {judgeFuseLimits(limitFacts{conf, 0, 256}), levelOK, "256"},
		"no known limits":    {judgeFuseLimits(limitFacts{conf, -1, -1}), levelOK, ""},
		"few pages":          {judgeFuseLimits(limitFacts{conf, 0, 32}), levelWarning, "max_pages_limit=256"},
		"few requests":       {judgeFuseLimits(limitFacts{conf, 12, 256}), levelWarning, "max_user_bgreq"},
		"few, but for root":  {judgeFuseLimits(limitFacts{confFacts{root: true, mounts: 5, mountMax: 3}, 12, 256}), levelOK, ""},
		"too many mounts":    {judgeFuseLimits(limitFacts{confFacts{mounts: 3, mountMax: 3}, 0, 256}), levelFailed, "mount_max"},
		"mounts no limit":    {judgeFuseLimits(limitFacts{confFacts{mounts: 3, mountMax: -1}, 0, 256}), levelOK, ""},
		"loop":               {judgeLoop(loopFacts{root: true, configure: unix.EBADF}), levelOK, "LOOP_CONFIGURE works"},
		"loop taken":         {judgeLoop(loopFacts{root: true, configure: unix.EBUSY}), levelOK, ""},
		"no free loop":       {judgeLoop(loopFacts{root: true, inUse: 8}), levelOK, "none was free"},
		"old loop":           {judgeLoop(loopFacts{root: true, configure: unix.EINVAL}), levelFailed, "LOOP_CONFIGURE"},
		"loop in a cage":     {judgeLoop(loopFacts{root: true, control: unix.EPERM}), levelFailed, "DeviceAllow"},
		"no loop":            {judgeLoop(loopFacts{root: true, control: unix.ENOENT}), levelFailed, "modprobe loop"},
		"loop refuses":       {judgeLoop(loopFacts{root: true, configure: unix.EPERM}), levelWarning, "CAP_SYS_ADMIN"},
		"loop without root":  {judgeLoop(loopFacts{}), levelSkipped, "root"},
		"files":              {judgeFiles(1024), levelOK, "1024"},
		"few files":          {judgeFiles(256), levelWarning, "LimitNOFILE"},
		"memory":             {judgeMemory(memoryFacts{192 << 20, 4 * gib, -1}), levelOK, "4.0 GiB are available"},
		"memory not known":   {judgeMemory(memoryFacts{192 << 20, -1, -1}), levelOK, ""},
		"limited memory":     {judgeMemory(memoryFacts{192 << 20, 4 * gib, gib}), levelOK, "1.0 GiB"},
		"too little memory":  {judgeMemory(memoryFacts{192 << 20, 100 << 20, -1}), levelWarning, "--memory"},
		"too little allowed": {judgeMemory(memoryFacts{192 << 20, 4 * gib, 128 << 20}), levelFailed, "MemoryMax"},
	})
}

func TestFuseConfIsReadAsFusermountDoes(t *testing.T) {
	for text, want := range map[string]struct {
		others bool
		max    int
	}{
		"":                                  {false, 1000},
		"#user_allow_other\n":               {false, 1000},
		"user_allow_other":                  {true, 1000},
		" user_allow_other \n":              {true, 1000},
		"user_allow_other=1\n":              {false, 1000},
		"mount_max = 5\nuser_allow_other\n": {true, 5},
		"mount_max=5\n":                     {false, 1000},
		"mount_max = -1\n":                  {false, -1},
		"mount_max = many\n":                {false, 1000},
	} {
		if others, max := readFuseConf([]byte(text)); others != want.others || max != want.max {
			t.Errorf("%q: %v %d", text, others, max)
		}
	}
}

// The least limit of a group and of those it is in holds.
func TestCgroupLimitIsTheLeastOfAllLevels(t *testing.T) {
	root := t.TempDir()
	limit := func(group, text string) {
		dir := filepath.Join(root, group)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "memory.max"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	limit("", "max\n")
	limit("system.slice", "1000\n")
	limit("system.slice/a.service", "2000\n")
	limit("b", "500\n")
	for membership, want := range map[string]int64{
		"0::/system.slice/a.service\n": 1000,
		"0::/system.slice\n":           1000,
		"0::/b\n":                      500,
		"0::/\n":                       -1,
		"0::/gone\n":                   -1,
		"12:memory:/b\n":               -1, // of version 1
		"5:cpu:/x\n0::/system.slice/a.service/deeper\n": 1000,
		"": -1,
	} {
		if got := cgroupLimit(root, membership); got != want {
			t.Errorf("%q: %d, want %d", membership, got, want)
		}
	}
}
